"""What a run leaves after its end, and what a repair changes. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable

from holdfast.contracts.data import clip
from holdfast.contracts.profile import Effect
from holdfast.contracts.recovery import Action, ActionEnd, LookBack, LookedBack, Past
from holdfast.contracts.run import (
    NO_UNDO,
    Pending,
    RunOutcome,
    RunResult,
    Standing,
    Stands,
    StepStatus,
    UndoRecord,
    awaiting,
    not_undone,
    percent,
)
from holdfast.contracts.tool_call import UndoStatus
from holdfast.reliability.ledger import Entry, State

IN_DOUBT = "it is not known whether it happened"
MAX_STANDING = 100_000
"""Bytes of one standing effect that the model reads again. All of them together: ten times as many."""


# ------------------------------------------------------------------ what crosses the boundary


def unwind_id(base: str) -> str:
    """Id of the workflow that unwinds the run of this key base."""
    return f"unwind-{base.replace('/', '-')}"


# ------------------------------------------------------------------ what stands, what is doubtful


def undone(entries: Iterable[Entry]) -> set[str]:
    """Keys of the calls whose compensation is known to have succeeded, or to have found nothing to undo."""
    return {e.key.removesuffix("/undo") for e in entries if e.kind == "undo" and e.state is State.DONE}


def effects(entries: Iterable[Entry]) -> list[Entry]:
    """The rows of calls that change something outside."""
    return [e for e in entries if e.kind == "tool" and e.effect != Effect.READ]


def standing(entries: list[Entry]) -> list[Standing]:
    """The effects that still stand, for a run that tries the same work again."""
    gone, names = undone(entries), {e.key: e.name for e in entries}
    found = [e for e in effects(entries) if e.state is State.DONE and e.key not in gone and e.settled]
    limit = min(MAX_STANDING, 10 * MAX_STANDING // max(len(found), 1))
    # The effect of a fallback answers the calls of the tool that it stood in for.
    return [
        Standing(tool=names.get(e.key.partition("/fb-")[0], e.name), key=e.key, content=clip(_text(e), limit))
        for e in found
    ]


def doubtful(entries: list[Entry]) -> list[Entry]:
    """Calls that may have happened and are neither settled nor undone."""
    gone = undone(entries)
    open_ones = [e for e in effects(entries) if e.state in (State.UNKNOWN, State.RESERVED) and e.key not in gone]
    # A call that only asks a model (`Tool.pure`) has no effect outside, however its attempt was cut off.
    return [e for e in open_ones if e.service != "model" or e.effect != Effect.IDEMPOTENT]


def also_pending(result: RunResult, entries: list[Entry], roles: dict[str, str]) -> list[Pending]:
    """Unknown calls at the end of a run that its result does not list. roles: who settles the calls of a tool.

    The workflow does not know how an interrupted call ended. A failed compensation has a dead letter of its own.
    """
    said = {pending.key for pending in result.pending}
    owed = {undo.seq for undo in result.undone if undo.status is UndoStatus.FAILED}
    return [
        Pending(step=e.name, role=roles.get(e.name, ""), what=e.error or IN_DOUBT, key=e.key)
        for e in doubtful(entries)
        if e.seq not in owed and not said.intersection((e.key, e.key.partition("/fb-")[0]))
    ]


def looked_back(of: LookBack, entries: list[Entry]) -> LookedBack:
    """What a reset run has to know of its effects. Empty if none was undone: then the ledger answers under its keys."""
    calls = {e.key: e for e in effects(entries)}
    undos = {e.key.removesuffix("/undo"): e.state for e in entries if e.kind == "undo"}
    begun = {key for key, state in undos.items() if key in calls and state in (State.RESERVED, State.UNKNOWN)}
    gone = (undone(entries) & calls.keys()) | {e.key for e in calls.values() if e.state is State.COMPENSATED}
    if not begun | gone:
        return LookedBack()
    ahead = [e for e in calls.values() if e.key not in begun | gone and ((e.seq or 0) > of.seq or e.seq in of.open)]
    names = {e.key: e.name for e in calls.values()}

    def past(keys: Iterable[str], why: str = "") -> list[Past]:
        rows = {e.seq: e for e in sorted((calls[key] for key in keys), key=lambda e: e.key, reverse=True)}
        return [
            # A fallback counts as the call that it stood in for.
            Past(
                seq=seq,
                tool=names.get(f"{e.key_base}/{seq}", e.name),
                version=e.version,
                arguments=e.arguments or {},
                why=why,
            )
            for seq, e in sorted(rows.items(), key=lambda each: each[0] or 0)
            if seq is not None
        ]

    return LookedBack(
        gone=[each for each in past(gone) if each.seq not in {calls[key].seq for key in begun}],
        undoing=past(begun),
        doubtful=past((e.key for e in doubtful(ahead)), IN_DOUBT),
        standing=standing(ahead),
        last=max(e.seq or 0 for e in calls.values()),
    )


def left_behind(key_base: str, entries: list[Entry]) -> list[Entry]:
    """One row for each call of a run that may have left something outside, the newest first."""
    may_stand = [e for e in effects(entries) if e.state is not State.COMPENSATED]
    calls = {e.seq for e in may_stand if e.seq is not None and not (e.state is State.FAILED and e.settled)}
    rows = {e.seq: e for e in reversed(effects(entries)) if e.seq in calls}
    # The call's own row rather than that of its fallback: the undo of the call undoes the fallback too.
    rows |= {e.seq: e for e in effects(entries) if e.seq in calls and e.key == f"{key_base}/{e.seq}"}
    return sorted(rows.values(), key=lambda e: e.seq or 0, reverse=True)


def _text(entry: Entry) -> str:
    result = entry.settled.result if entry.settled else None
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def refusal(action: Action, entries: list[Entry], outcome: RunOutcome | None) -> str:
    """Why a call must not be replayed, and what to do instead; empty when it may. outcome: how its run ended."""
    if action.do != "call":
        return ""
    row = next((e for e in entries if e.key == action.key), None)
    if not action.key:
        return f"no tool of step {action.step} was ever called, so there is nothing to replay: settle it"
    if outcome is not None and outcome.unwinds:
        return f"its run ended {outcome}, so its calls are not made again: settle it, or replay the run"
    if row is None:
        return "the ledger has no row for it, so its arguments are unknown: settle it"
    if row.state is State.COMPENSATED:
        return f"{row.name} was undone"
    if row.effect == Effect.MANUAL and row.state in (State.UNKNOWN, State.RESERVED):
        return f"it is unknown whether {row.name} happened, and its service cannot be asked: settle it first"
    if other := next((e for e in doubtful(entries) if e.key.startswith(f"{action.key}/fb-")), None):
        return f"{other.name} stood in for it and may have happened: settle {other.key} first"
    return ""


# ------------------------------------------------------------------ what a repair makes of a run's result


def amended(result: RunResult, ends: list[ActionEnd]) -> RunResult:
    """The result of a run after a repair. Idempotent."""
    result = result.model_copy(deep=True)
    pending = list(result.pending)
    for end in ends:
        if end.action.do == "undo" or end.action.key.endswith("/undo"):
            _after_undo(result, end)
        else:
            _after_call(result, end)
        if end.words not in result.notes:
            result.notes.append(end.words)
    if result.outcome is RunOutcome.PARTIAL:
        result.outcome = RunOutcome.PARTIAL if result.pending else RunOutcome.COMPLETED
        result.reason = awaiting(result.steps, result.pending) if result.pending else ""
        _bring_up_to_date(result, [each for each in pending if each not in result.pending], ends)
    result.percent = percent(result.steps)
    undone = {record.seq for record in result.undone}
    result.stands = [each for each in result.stands if each.seq not in undone] + not_undone(result.undone)
    result.stands.sort(key=lambda each: each.seq)
    return result


def _bring_up_to_date(result: RunResult, done: list[Pending], ends: list[ActionEnd]) -> None:
    """Replaces the summary: the agent's final words call things pending that are done by now."""
    titles = {step.name: step.title for step in result.steps}
    for each in done:
        words = "; ".join(end.words for end in ends if concerns(end.action, each.step, each.key))
        result.since.append(f"{titles.get(each.step) or each.step}: {words}")
    if done:
        result.said = result.said or result.summary
        result.summary = f"Since the run's end: {'; '.join(result.since)}"


def concerns(action: Action, step: str, key: str) -> bool:
    """Whether the action is about this pending entry: its call, a fallback of it, or a step that was never called."""
    return action.key.partition("/fb-")[0] == key if key else action.step == step


def _after_call(result: RunResult, end: ActionEnd) -> None:
    action = end.action
    for pending in [p for p in result.pending if concerns(action, p.step, p.key)]:
        steps = [s for s in result.steps if s.name == pending.step]
        if end.ok and (action.do == "call" or action.happened):
            if result.outcome.unwinds and action.key:
                result.stands.append(Stands(seq=action.seq, tool=action.tool, why=NO_UNDO))
            result.pending.remove(pending)
            for step in steps:
                step.status, step.detail, step.eta, step.seq = StepStatus.DONE, end.words, None, None
        else:
            pending.what = end.words
            for step in steps:
                step.detail = end.words


def _after_undo(result: RunResult, end: ActionEnd) -> None:
    for record in result.undone:
        if record.seq != end.action.seq:
            continue
        record.status, record.note = end.undo or UndoStatus.FAILED, end.words
        if record.status is UndoStatus.UNDONE:
            for step in result.steps:
                if step.name == record.step:
                    step.status = StepStatus.UNDONE


def record_of(end: ActionEnd) -> UndoRecord:
    """An undo as an entry of a run's result."""
    action = end.action
    return UndoRecord(
        seq=action.seq,
        tool=action.tool,
        version=action.version,
        arguments=action.arguments,
        step=action.step,
        status=end.undo or UndoStatus.FAILED,
        note=end.words,
    )
