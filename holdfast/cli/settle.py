"""`starter.py settle`: a person records how a call ended whose outcome is unknown or left to a person."""

from __future__ import annotations

from typing import Any

from temporalio.client import Client

from holdfast.cli.dead_letters import store, wait_for
from holdfast.cli.lookup import Handle, Known, NoAnswer, ask, find
from holdfast.cli.output import Refused, out, parse_json, print_json
from holdfast.cli.runs import checked_decision, connect, report, send
from holdfast.contracts import door
from holdfast.contracts.people import Approval, Verdict
from holdfast.contracts.recovery import Action, Repair
from holdfast.contracts.run import RunResult
from holdfast.contracts.wording import did_you_mean
from holdfast.engine.starting import BadRequest
from holdfast.recovery.dead_letters import DeadLetters, LetterKind, letter_id
from holdfast.recovery.model import concerns, doubtful
from holdfast.recovery.requests import start_repair
from holdfast.reliability.ledger import Entry, Ledger
from holdfast.settings import settings


async def settle(run: str, what: str, *, happened: bool, result: str, by: str, comment: str, as_json: bool) -> int:
    """Answers the question of an open run; after the run's end, starts a repair workflow that records the finding.

    what: the step, the tool, the ledger key or the approval's id. result: JSON. Raises Refused.
    """
    value = _parse(result)
    by = door.name("--by", by)
    door.reason("--comment", comment)
    client = await connect()
    known = await find(client, run, with_row=True)
    if known.running:
        return await _answer(client, known.handle, what, happened, value, by, comment, as_json)
    repair = await _repair(known, what, happened, value, by, comment)
    try:
        return await _record(client, repair, as_json)
    except BadRequest as refused:
        raise Refused(str(refused)) from None


def _parse(result: str) -> Any:
    if not result:
        return None
    try:
        return parse_json("--result", result)
    except Refused as error:
        raise Refused(f"{error}; a text needs its quotes: --result '\"done by phone\"'") from None


# ------------------------------------------------------------------ while the run is open


async def _answer(
    client: Client, handle: Handle, what: str, happened: bool, value: Any, by: str, comment: str, as_json: bool
) -> int:
    try:
        opened: list[Approval] = await ask(client, handle, "approvals", list[Approval])
    except NoAnswer as error:
        raise Refused(f"{handle.id} cannot be asked which call is meant: {error}") from None
    questions = [a for a in opened if a.kind == "outcome"]
    meant = [a for a in questions if what in (a.id, a.step, a.subject, a.key)]
    if len(meant) != 1:
        there = ", ".join(f"{a.step or a.subject} ({a.id})" for a in questions) or "none"
        how = "several calls" if meant else "no call"
        like = did_you_mean(what, [name for a in questions for name in (a.step, a.subject, a.key)])
        raise Refused(f"{handle.id} asks about {how} {what!r}; open questions: {there}{'' if meant else like}")
    verdict = Verdict.HAPPENED if happened else Verdict.DID_NOT
    decision = checked_decision(meant[0].id, verdict, by, comment, result=value)
    return report(await send(handle, decision), as_json)


# ------------------------------------------------------------------ after its end


async def _repair(known: Known, what: str, happened: bool, value: Any, by: str, comment: str) -> Repair:
    """The finding as a repair. Raises Refused when there is no such call, or nothing to settle about it."""
    result = await known.result()
    if result is None:
        raise Refused(
            f"{known.workflow_id} ended without a result; when it was terminated, `uv run starter.py orphans --fix` "
            "undoes what it did and records its end"
        )
    async with store() as db:
        entries = await Ledger(db, "").entries(result.key_base)
        action = _open_end(known.workflow_id, what, result, entries)
        key = action.key.partition("/fb-")[0]
        kind = LetterKind.UNDO if key.endswith("/undo") else LetterKind.CALL
        letter = await DeadLetters(db).get(letter_id(kind, key or f"{result.key_base}/{action.step}"))
    action.happened, action.result, action.comment = happened, value, comment
    return Repair(
        workflow_id=known.workflow_id,
        key_base=result.key_base,
        agent=result.agent,
        tenant=letter.tenant if letter else "default",
        by=by,
        letter=letter.id if letter else letter_id(kind, key or f"{result.key_base}/{action.step}"),
        actions=[action],
    )


def _open_end(run: str, what: str, result: RunResult, entries: list[Entry]) -> Action:
    """The call that `what` names, among those that a person may still settle. Raises Refused."""
    rows = {entry.key: entry for entry in entries}
    ends = {
        p.key or p.step: Action(do="settle", key=p.key, step=p.step, tool=rows[p.key].name if p.key in rows else "")
        for p in result.pending
    }
    for entry in doubtful(entries):
        action = Action(do="settle", key=entry.key, tool=entry.name)
        if pending := next((p for p in result.pending if concerns(action, p.step, p.key)), None):
            # A fallback's row stands for the call that it replaced.
            ends.pop(pending.key, None)
            action.step = pending.step
        ends[entry.key] = action
    for undo in result.undone:
        key = f"{result.key_base}/{undo.seq}/undo"
        if undo.status == "failed" and key in rows:
            ends[key] = Action(do="settle", key=key, tool=undo.tool, step=f"undo of {undo.tool}")
    for key, action in ends.items():
        seq = key.removeprefix(f"{result.key_base}/").partition("/")[0]
        action.seq = int(seq) if action.key and seq.isdigit() else 0
    meant = [a for key, a in ends.items() if what in (key, a.step, a.tool, key.removeprefix(f"{result.key_base}/"))]
    if len(meant) != 1:
        if not ends:
            raise Refused(f"{run} has no call left to settle")
        there = ", ".join(f"{action.step or action.tool} ({key})" for key, action in ends.items())
        how = "several calls" if meant else "no call"
        like = did_you_mean(what, [name for key, a in ends.items() for name in (a.step, a.tool, key) if name])
        raise Refused(f"{run} has {how} {what!r} to settle; there is: {there}{'' if meant else like}")
    return meant[0]


async def _record(client: Client, repair: Repair, as_json: bool) -> int:
    handle = await start_repair(client, repair, settings().task_queue)
    ok, words = await wait_for(handle)
    if as_json:
        print_json({"workflow_id": repair.workflow_id, "repair": handle.id, "ok": ok, "words": words})
    else:
        out.print(words, markup=False)
    return 0 if ok else 1
