"""`message`, `edit` and `answer`: what a person says to a run while it works."""

from __future__ import annotations

import json

from pydantic import ValidationError

from agents import registry
from holdfast import door
from holdfast.cli.known import Known, NoAnswer, ask, find_running
from holdfast.cli.output import Refused, parse_json, read_stdin
from holdfast.cli.runs import checked_decision, connect, read_input, report, send
from holdfast.contracts import Approval, Json, Message, RunStatus, Verdict
from holdfast.tools import explain
from holdfast.wording import did_you_mean


async def message(run: str, text: str, by: str, as_json: bool) -> int:
    """Says something to a run. Raises Refused and Unfit."""
    text = read_stdin("TEXT").strip() if text == "-" else text
    said = door.checked(Message, {"text": text, "by": by})
    known = await find_running(await connect(), run)
    return report(await send(known.handle, said), as_json)


async def answer(run: str, question: str, text: str, by: str, comment: str, parse: bool, as_json: bool) -> int:
    """Answers what the agent asks. parse: the answer is JSON, not a text. Raises Refused."""
    value = parse_json("the answer", text) if parse else text
    if value is None or (isinstance(value, str) and not door.visible(value)):
        raise Refused("the answer is empty")
    known = await find_running(await connect(), run)
    decision = checked_decision(question, Verdict.ANSWER, by, comment, answer=value)
    return report(await send(known.handle, decision), as_json)


async def edit(
    run: str, approval_id: str, pairs: list[str], arguments: str, by: str, comment: str, as_json: bool
) -> int:
    """Lets a call run with other arguments: some of them changed (`name=value`), or all given as JSON. Raises Refused.

    They are checked here, and by the run once more: this machine may know another version of the tool.
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
    """The changes as JSON data; a value that is not JSON is a text."""
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
        return  # it lives on the workers only: they check
    try:
        if known:
            known.validate(arguments)
    except ValidationError as error:
        raise Refused(f"{tool} does not take these arguments: {explain(error)}") from None
