"""What a batch decides and shows. Pure functions over its state."""

from __future__ import annotations

import shlex
from datetime import datetime, timedelta
from math import ceil

from holdfast.contracts.batch import MAX_FAILURES, BatchInput, BatchProfile, BatchState, ItemFailure
from holdfast.contracts.run import Items, Phase, RunOutcome, RunResult, RunStatus
from workflows.progress import cost, plain
from workflows.state import Ending

MARKS = 6
SHOWN = 10
HARD_EVENTS = 8_000
"""Temporal warns at 10,240 events of an execution."""


def has_room(profile: BatchProfile, open_: int, parked: int) -> bool:
    """Whether one more item may start. An item that waits gives its place away, up to `most_open` open items."""
    return open_ - parked < profile.window and open_ < profile.most_open


def is_long(full: bool, events: int, parked: int) -> bool:
    """Whether it is time to continue as new, which has to wait until all open items have ended.

    That may take as long as a service is down, so the batch goes on while an item waits and history has space.
    """
    return full and (parked == 0 or events >= HARD_EVENTS)


def count(state: BatchState, result: RunResult | None, failure: ItemFailure | None) -> None:
    """Counts the end of one item. result: the result of its run, if there is one."""
    if result:
        state.usage += result.usage
        state.turns += result.turns
        state.calls += result.calls
        state.call_failures += result.failures
    if failure is None:
        state.done += 1
        return
    state.failed += 1
    if len(state.failures) < MAX_FAILURES:
        state.failures.append(failure)


def mark(state: BatchState, now: datetime) -> None:
    """Records how far the batch is, for the rate."""
    state.marks = [*state.marks[-MARKS:], (now, state.done + state.failed)]


def items(state: BatchState, open_: int, parked: int) -> Items:
    return Items(total=state.total, done=state.done, failed=state.failed, open=open_, parked=parked)


def per_minute(state: BatchState) -> float:
    """Items a minute over the last marks; 0 while that is unknown."""
    (since, before), (until, after) = (state.marks[0], state.marks[-1]) if state.marks else ((None, 0), (None, 0))
    minutes = (until - since) / timedelta(minutes=1) if since and until else 0.0
    return (after - before) / minutes if minutes > 0 else 0.0


def judge(state: BatchState) -> Ending:
    """How a batch ends when all its items have ended."""
    unit = state.profile.unit if state.profile else "items"
    if not state.failed:
        return Ending(RunOutcome.COMPLETED, "", f"{state.done} {unit}. {state.words}")
    first = ", ".join(f"{each.name} ({each.why})" for each in state.failures[:3])
    more = f", and {state.failed - 3} more" if state.failed > 3 else ""
    reason = f"{state.failed} of {state.total} {unit} failed: {first}{more}"
    return Ending(RunOutcome.PARTIAL if state.done else RunOutcome.FAILED, reason, state.words)


# ------------------------------------------------------------------ words


def headline(given: BatchInput, state: BatchState, counts: Items, ending: Ending | None, now: datetime) -> str:
    """'Contracts in progress: 130/500 documents, 2 failed, 20 at work, 5 waiting. 43 a minute. ETA 9 minutes'"""
    if ending:
        # The page of a partial batch lists what failed.
        reason = "" if ending.outcome is RunOutcome.PARTIAL else ending.reason
        return f"{given.batch.capitalize()} {ending.outcome}: {tally(state, counts)}" + (
            f". {reason}" if reason else ""
        )
    parts = [f"{given.batch.capitalize()} in progress: {tally(state, counts)}"]
    if state.phase is Phase.COMPENSATING:
        parts.append(f"Cancelling the open runs ({counts.open})")
    rate = per_minute(state)
    if rate and counts.open > counts.parked:
        minutes = ceil((counts.total - counts.ended) / rate)
        parts.append(f"{rate:.0f} a minute. ETA {minutes} minute{'s' * (minutes != 1)}")
    return ". ".join(parts)


def tally(state: BatchState, counts: Items) -> str:
    unit = state.profile.unit if state.profile else "items"
    parts = [f"{counts.ended}/{counts.total} {unit}"]
    parts += [f"{counts.failed} failed"] * bool(counts.failed)
    parts += [f"{counts.open - counts.parked} at work"] * (counts.open > counts.parked)
    parts += [f"{counts.parked} waiting"] * bool(counts.parked)
    return ", ".join(parts)


def page(
    given: BatchInput, workflow_id: str, state: BatchState, counts: Items, ending: Ending | None, now: datetime
) -> str:
    """The Markdown that the Web UI shows as the batch's current details."""
    parts = [f"**{plain(headline(given, state, counts, ending, now))}**"]
    filled = counts.percent // 5
    parts.append(f"`{'█' * filled}{'░' * (20 - filled)}` {counts.percent} %")
    if state.words:
        parts.append(plain(state.words))
    if state.failures:
        rows = [f"- {plain(each.name)}: {plain(each.why)} (`{each.id}`)" for each in state.failures[:SHOWN]]
        rows += [f"- … and {state.failed - SHOWN} more"] * (state.failed > SHOWN)
        parts.append("### Failed\n" + "\n".join(rows))
    parts.append(f"Its runs:\n\n```\nuv run starter.py list --batch {shlex.quote(workflow_id)}\n```")
    if state.notes:
        parts.append("### Notes\n" + "\n".join(f"- {plain(note)}" for note in state.notes[-10:]))
    if state.usage.calls:
        parts.append(f"Model: {cost(state.usage)}")
    return "\n\n".join(parts)


def status(given: BatchInput, state: BatchState, counts: Items, ending: Ending | None, now: datetime) -> RunStatus:
    """The answer to the query `status`."""
    return RunStatus(
        agent=given.batch,
        phase=state.phase,
        line=headline(given, state, counts, ending, now),
        percent=counts.percent,
        notes=state.notes,
        turn=state.turns,
        calls=state.calls,
        usage=state.usage,
        key_base=state.key_base,
        trace_id=given.trace_id,
        outcome=ending.outcome if ending else None,
        items=counts,
    )


def result(given: BatchInput, state: BatchState, counts: Items, ending: Ending) -> RunResult:
    """The result of a batch that has ended."""
    return RunResult(
        outcome=ending.outcome,
        summary=ending.summary,
        reason=ending.reason,
        agent=given.batch,
        key_base=state.key_base,
        usage=state.usage,
        turns=state.turns,
        calls=state.calls,
        failures=state.call_failures,
        trace_id=given.trace_id,
        percent=counts.percent,
        notes=state.notes[-20:],
        items=counts,
    )
