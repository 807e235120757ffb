"""How a run ended, kept in the store: it outlives Temporal's retention, and a cancelled run has no other result.

What it could not do is kept as dead letters, written before the end: a crash between the two doubles nothing.
"""

from __future__ import annotations

from temporalio import activity

from activities.boundary import boundary, this_workflow
from agents import registry
from holdfast.contracts import Json, Pending, RunEnd, RunOutcome, RunResult, StepState, UndoStatus, clip
from holdfast.reliability import faults
from holdfast.reliability.errors import classify, hopeless
from holdfast.reliability.faults import Point
from holdfast.reliability.ledger import Entry
from holdfast.repairs import also_pending, doubtful
from holdfast.runtime import Runtime
from holdfast.state.letters import Letter, LetterKind, Letters, LetterState, dump, letter_id
from holdfast.state.runs import Runs
from holdfast.telemetry import metrics

MAX_KEPT = 2_000
"""Bytes of a text in a result that cannot be kept whole."""


class RunRecords:
    def __init__(self, runtime: Runtime) -> None:
        self._ledger = runtime.ledger
        self._runs = Runs(runtime.db)
        self._letters = Letters(runtime.db)

    @activity.defn(name="record_end")
    async def record_end(self, end: RunEnd) -> list[Pending]:
        """Idempotent. What is pending besides what the result says: calls in doubt that only the ledger knows of."""
        with boundary():
            try:
                return await self.record(this_workflow(), end)
            except Exception as error:
                if not hopeless(error):
                    raise
                # Every run ends: without this one would wait for ever for an end that no store takes.
                activity.logger.exception("the end of a run cannot be kept whole")
                return await self.record(this_workflow(), bare(end, classify(error).message))

    async def record(self, workflow_id: str, end: RunEnd) -> list[Pending]:
        """Writes the letters that follow from the end of this run, closes those that it answers, keeps the result.

        Returns what it had to add to the result's `pending`.
        """
        result = end.result
        held = await self._letters.of_workflow(workflow_id)
        entries = [] if result.outcome is RunOutcome.COMPLETED else await self._ledger.entries(result.key_base)
        more = also_pending(result, entries, _roles(result.agent))
        result = result.model_copy(update={"pending": [*result.pending, *more]})
        end = end.model_copy(update={"result": result})
        run = await self._runs.by_workflow(workflow_id) if result.outcome is RunOutcome.FAILED else None
        request_key = run.request_key if run else workflow_id
        written = letters_of(end, workflow_id, entries, request_key, held)
        await self._letters.write(written)
        for letter in written:
            metrics.dead_letter(letter.kind)
        await self._answer(held, {letter.id for letter in written}, workflow_id, end)
        faults.reached(Point.LETTERS_WRITTEN, "run")
        await self._runs.finish(
            workflow_id,
            result.outcome,
            result.model_dump_json(),
            agent=result.agent,
            tenant=end.tenant,
            trace_id=result.trace_id,
            requested_by=end.requested_by,
        )
        faults.reached(Point.END_RECORDED, "run")
        return more

    async def _answer(self, held: list[Letter], written: set[str], workflow_id: str, end: RunEnd) -> None:
        """What this end means for the letters that the run already had to do with."""
        outcome = end.result.outcome
        for letter in held:
            if letter.id in written:
                continue
            if not outcome.unwinds or letter.key_base == end.result.key_base:
                await self._letters.close(letter.id, LetterState.REPLAYED, f"{workflow_id} ended {outcome}")
            else:
                # A compensation that was let be because this run built on its effect: it is owed again.
                await self._letters.give_back(letter, letter.key_base.rpartition("/")[0], f"{workflow_id}: {outcome}")


def bare(end: RunEnd, why: str) -> RunEnd:
    """The end without the data of people, models and services: how the run ended, and why the rest is not kept."""
    result = end.result
    note = f"the result could not be kept whole: {why}"
    kept = RunResult(
        outcome=result.outcome,
        reason=clip(result.reason, MAX_KEPT),
        agent=result.agent,
        key_base=result.key_base,
        steps=[StepState(name=each.name, status=each.status, critical=each.critical) for each in result.steps],
        pending=[each.model_copy(update={"what": clip(each.what, MAX_KEPT)}) for each in result.pending],
        undone=[each.model_copy(update={"arguments": {}, "note": clip(each.note, MAX_KEPT)}) for each in result.undone],
        usage=result.usage,
        turns=result.turns,
        calls=result.calls,
        failures=result.failures,
        trace_id=result.trace_id,
        percent=result.percent,
        notes=[clip(note, MAX_KEPT)],
        webhook=result.webhook,
    )
    return RunEnd(tenant=end.tenant, result=kept, requested_by=end.requested_by)


def _roles(agent: str) -> dict[str, str]:
    """By tool: the role that its step names."""
    specs = registry.agents()[agent].steps if agent in registry.agents() else ()
    return {tool: spec.role for spec in specs for tool in spec.tools}


def letters_of(
    end: RunEnd, workflow_id: str, entries: list[Entry], request_key: str, held: list[Letter]
) -> list[Letter]:
    """The dead letters that follow from the end of a run.

    entries: the run's ledger rows. request_key: its own. held: open letters that this run already has to do with, of
    which one is brought up to date when the run was itself the replay of a letter.
    """
    result = end.result
    rows = {entry.key: entry for entry in entries}
    unknown = {key for entry in doubtful(entries) for key in (entry.key, entry.key.partition("/fb-")[0])}

    def letter(kind: LetterKind, key: str, subject: str, role: str, cause: str, context: Json) -> Letter:
        id = letter_id(kind, key or result.key_base)
        common = (LetterState.OPEN, result.agent, end.tenant, workflow_id, result.key_base)
        return Letter(id, kind, *common, key, subject, role, cause, dump({"outcome": result.outcome, **context}))

    found: list[Letter] = []
    for pending in result.pending:
        # What a run that was unwound left undone needs nobody; what it may have done does.
        if result.outcome is not RunOutcome.PARTIAL and pending.key not in unknown:
            continue
        if not pending.key:
            made = letter(LetterKind.CALL, f"{result.key_base}/{pending.step}", pending.step, pending.role, "", {})
            found.append(made._replace(key="", cause=pending.what, context=dump({"step": pending.step, "keys": []})))
            continue
        entry = rows.get(pending.key)
        context = {"step": pending.step, **_call(pending.key, entry, entries)}
        subject = entry.name if entry else pending.step
        found.append(letter(LetterKind.CALL, pending.key, subject, pending.role, pending.what, context))
    for undo in result.undone:
        if undo.status is not UndoStatus.FAILED:
            continue
        key = f"{result.key_base}/{undo.seq}"
        called = {"seq": undo.seq, "version": undo.version, "arguments": undo.arguments}
        context = {"step": undo.step, **_call(f"{key}/undo", rows.get(f"{key}/undo"), entries), **called}
        found.append(letter(LetterKind.UNDO, f"{key}/undo", undo.tool, "", undo.note, context))
    before = next((each for each in held if each.kind == LetterKind.RUN), None)
    if result.outcome is RunOutcome.FAILED or (before and result.outcome.unwinds):
        first = {"request_key": request_key, "webhook": result.webhook, "replays": 0, "tries": [], "input": None}
        known = before.details if before else first
        context = known | {
            "outcome": result.outcome,
            "input": known["input"] if end.input is None else end.input,
            "tries": [base for base in known["tries"] if base != result.key_base] + [result.key_base],
            "attempts": [{**line, "key": entry.key} for entry in entries for line in entry.log],
            "keys": [entry.key for entry in entries],
        }
        made = letter(LetterKind.RUN, "", result.agent, "", result.reason or result.outcome, context)
        found.append(made._replace(id=before.id) if before else made)
    return found


def _call(key: str, entry: Entry | None, entries: list[Entry]) -> Json:
    """What the ledger knows of one call and of those that stood in for it or belong to it."""
    related = [each for each in entries if each.key == key or each.key.startswith(f"{key}/")]
    return {
        "seq": entry.seq if entry else None,
        "version": entry.version if entry else "1",
        "arguments": entry.arguments if entry else {},
        "keys": [each.key for each in related],
        "attempts": [{**line, "key": each.key} for each in related for line in each.log],
    }
