"""Records how a run ended in the store, which outlives Temporal's retention. A cancelled run has no other result.

What the run could not do becomes dead letters, written before the end. A crash between the two duplicates nothing.
"""

from __future__ import annotations

from temporalio import activity

from activities.boundary import boundary, this_workflow
from holdfast.authoring import registry
from holdfast.contracts.data import Json, clip
from holdfast.contracts.run import Pending, RunEnd, RunOutcome, RunResult, StepState
from holdfast.contracts.tool_call import UndoStatus
from holdfast.engine.runtime import Runtime
from holdfast.recovery.dead_letters import DeadLetter, DeadLetters, LetterKind, LetterState, dump, letter_id
from holdfast.recovery.model import also_pending, doubtful
from holdfast.reliability import crash_points
from holdfast.reliability.crash_points import Point
from holdfast.reliability.errors import classify, hopeless
from holdfast.reliability.ledger import Entry
from holdfast.state.runs import Runs
from holdfast.telemetry import metrics

MAX_KEPT = 2_000
"""Bytes to which a text is cut when the store does not take the whole result."""


class RunRecords:
    def __init__(self, runtime: Runtime) -> None:
        self._ledger = runtime.ledger
        self._runs = Runs(runtime.db)
        self._letters = DeadLetters(runtime.db)

    @activity.defn(name="record_end")
    async def record_end(self, end: RunEnd) -> list[Pending]:
        """Records the end. Idempotent. Returns what else is pending: unknown calls that only the ledger knows."""
        with boundary():
            try:
                return await self.record(this_workflow(), end)
            except Exception as error:
                if not hopeless(error):
                    raise
                # Every run must end: without this, a run would retry forever with a result that no store accepts.
                activity.logger.exception("the end of a run cannot be kept whole")
                return await self.record(this_workflow(), bare(end, classify(error).message))

    async def record(self, workflow_id: str, end: RunEnd) -> list[Pending]:
        """Writes the dead letters of this end, closes those that it resolves, and stores the result.

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
        crash_points.reached(Point.LETTERS_WRITTEN, "run")
        await self._runs.finish(
            workflow_id,
            result.outcome,
            result.model_dump_json(),
            agent=result.agent,
            tenant=end.tenant,
            trace_id=result.trace_id,
            requested_by=end.requested_by,
        )
        crash_points.reached(Point.END_RECORDED, "run")
        return more

    async def _answer(self, held: list[DeadLetter], written: set[str], workflow_id: str, end: RunEnd) -> None:
        """Closes or returns the open letters that already belonged to this run."""
        outcome = end.result.outcome
        for letter in held:
            if letter.id in written:
                continue
            if not outcome.unwinds or letter.key_base == end.result.key_base:
                await self._letters.close(letter.id, LetterState.REPLAYED, f"{workflow_id} ended {outcome}")
            else:
                # A compensation that was suspended because this run built on its effect: it is owed again.
                await self._letters.give_back(letter, letter.key_base.rpartition("/")[0], f"{workflow_id}: {outcome}")


def bare(end: RunEnd, why: str) -> RunEnd:
    """The end without data of people, models and services: how the run ended, and why the rest is not kept."""
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
    end: RunEnd, workflow_id: str, entries: list[Entry], request_key: str, held: list[DeadLetter]
) -> list[DeadLetter]:
    """The dead letters that follow from the end of a run.

    entries: the run's ledger rows. request_key: the run's. held: open letters that already belong to this run; if the
    run is the replay of one of them, that letter is updated.
    """
    result = end.result
    rows = {entry.key: entry for entry in entries}
    unknown = {key for entry in doubtful(entries) for key in (entry.key, entry.key.partition("/fb-")[0])}

    def letter(kind: LetterKind, key: str, subject: str, role: str, cause: str, context: Json) -> DeadLetter:
        id = letter_id(kind, key or result.key_base)
        common = (LetterState.OPEN, result.agent, end.tenant, workflow_id, result.key_base)
        return DeadLetter(id, kind, *common, key, subject, role, cause, dump({"outcome": result.outcome, **context}))

    found: list[DeadLetter] = []
    for pending in result.pending:
        # An unwound run leaves no work to a person, only calls that may have had their effect: a person settles those.
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
    """What the ledger knows of one call, of its fallbacks and of the calls under its key."""
    related = [each for each in entries if each.key == key or each.key.startswith(f"{key}/")]
    return {
        "seq": entry.seq if entry else None,
        "version": entry.version if entry else "1",
        "arguments": entry.arguments if entry else {},
        "keys": [each.key for each in related],
        "attempts": [{**line, "key": each.key} for each in related for line in each.log],
    }
