"""`starter.py message`, `edit` and `answer`: what a person sends to an open run."""

from __future__ import annotations

import json

from pydantic import ValidationError

from holdfast.authoring import registry
from holdfast.cli.lookup import Known, NoAnswer, ask, find_running
from holdfast.cli.output import Refused, parse_json, read_stdin
from holdfast.cli.runs import checked_decision, connect, read_input, report, send
from holdfast.contracts import door
from holdfast.contracts.data import Json
from holdfast.contracts.failures import explain
from holdfast.contracts.people import Approval, Message, Verdict
from holdfast.contracts.run import RunStatus
from holdfast.contracts.wording import did_you_mean


async def message(run: str, text: str, by: str, as_json: bool) -> int:
    """Sends a message to a run. Raises Refused and Unfit."""
    text = read_stdin("TEXT").strip() if text == "-" else text
    said = door.checked(Message, {"text": text, "by": by})
    known = await find_running(await connect(), run)
    return report(await send(known.handle, said), as_json)


async def answer(run: str, question: str, text: str, by: str, comment: str, parse: bool, as_json: bool) -> int:
    """Answers an agent's question. parse: the answer is JSON, not text. Raises Refused."""
    value = parse_json("the answer", text) if parse else text
    if value is None or (isinstance(value, str) and not door.visible(value)):
        raise Refused("the answer is empty")
    known = await find_running(await connect(), run)
    decision = checked_decision(question, Verdict.ANSWER, by, comment, answer=value)
    return report(await send(known.handle, decision), as_json)


async def edit(
    run: str, approval_id: str, pairs: list[str], arguments: str, by: str, comment: str, as_json: bool
) -> int:
    """Approves a call with changed arguments: some of them (`name=value`), or all of them as JSON. Raises Refused.

    The arguments are checked here and again by the run: this machine may have another version of the tool.
    """
    if bool(pairs) == bool(arguments):
        raise Refused("say what to change: --set NAME=VALUE (as often as needed), or all of it with --arguments JSON")
    changes = read_input(arguments, "--arguments") if arguments else _changes(pairs)
    client = await connect()
    known = await find_running(client, run)
    try:
        status: RunStatus = await ask(client, known.handle, "status", RunStatus)
    except NoAnswer as error:
        raise Refused(f"{run} cannot be asked what the call's arguments are: {error}") from None
    approval = _meant(known, status.approvals, approval_id)
    wanted = changes if arguments else approval.arguments | changes
    _check(status.agent, approval.subject, wanted)
    decision = checked_decision(approval.id, Verdict.EDIT, by, comment, arguments=wanted, digest=approval.digest)
    return report(await send(known.handle, decision), as_json)


def _meant(known: Known, opened: list[Approval], approval_id: str) -> Approval:
    calls = [a for a in opened if a.kind == "tool"]
    meant = [a for a in calls if approval_id in ("", a.id)]
    if len(meant) == 1:
        return meant[0]
    there = ", ".join(f"{a.id} ({a.subject})" for a in calls) or "none"
    like = did_you_mean(approval_id, [a.id for a in calls])
    raise Refused(f"{known.workflow_id}: which call is to be edited? open approvals of calls: {there}{like}")


def _changes(pairs: list[str]) -> Json:
    """The changes as JSON data; a value that is not JSON is taken as text."""
    changes: Json = {}
    for pair in pairs:
        name, is_given, value = pair.partition("=")
        if not is_given or not name:
            raise Refused(f"--set takes NAME=VALUE, not {pair!r}")
        try:
            changes[name] = json.loads(value)
        except (ValueError, RecursionError):
            changes[name] = value
    return changes


def _check(agent: str, tool: str, arguments: Json) -> None:
    """Raises Refused when the tool, as known here, does not take the arguments."""
    try:
        known = registry.agent(agent).by_name.get(tool)
    except registry.UnknownAgent:
        return  # only the workers have this agent: they check
    try:
        if known:
            known.validate(arguments)
    except ValidationError as error:
        raise Refused(f"{tool} does not take these arguments: {explain(error)}") from None
