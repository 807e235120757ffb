"""What the kill sweep tries and what it demands: pure functions over traces and over what is on record about a run.

A case is a crash point at a place (a tool, a turn) of the discharge run, and a way to be hit there. Nothing is listed
by hand: the cases are what undisturbed runs pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from holdfast.contracts import RunOutcome, RunResult, StepStatus
from holdfast.reliability.faults import Point
from holdfast.reliability.ledger import Entry, State
from holdfast.simulation.hospital import EffectRow, RequestRow
from holdfast.simulation.scripted_model import CallRow

ASKED = f"{Point.WAITING}@approvals"
"""The trace's line for a run that waits for a human; written by the tracer, as workflow code does no I/O."""
READS = ("records", "insurance")


class Mode(StrEnum):
    KILL = "kill"
    """SIGKILL at the point."""
    FREEZE = "freeze"
    """SIGSTOP at the point, SIGCONT when another worker has ended the run."""


class Flow(StrEnum):
    """How the run would end undisturbed."""

    APPROVED = "approved"
    FAILED = "failed"
    """The message to the patient is refused for good after approval, so all that was done is undone."""


@dataclass(frozen=True)
class Case:
    mode: Mode
    flow: Flow
    point: Point
    where: str

    @property
    def fault(self) -> str:
        """The value of HOLDFAST_FAULT."""
        return f"{self.mode}:{self.point}@{self.where}"

    def __str__(self) -> str:
        return self.fault + (" (failing run)" if self.flow is Flow.FAILED else "")


def cases(traces: Mapping[Flow, Sequence[str]], mode: Mode) -> list[Case]:
    """Every point at every place that the traces pass, once; the end of a run once for each flow."""
    found: dict[str, Case] = {}
    for flow in Flow:
        for line in traces[flow]:
            point, _, where = line.partition("@")
            name = f"{line} {flow}" if point == Point.END_RECORDED else line
            found.setdefault(name, Case(mode, flow, Point(point), where))
    return list(found.values())


def unreached(traces: Mapping[Flow, Sequence[str]]) -> list[Point]:
    """The points of the enum that no run passed: a sweep that does not try them shows nothing about them."""
    passed = {line.partition("@")[0] for lines in traces.values() for line in lines}
    return [point for point in Point if point not in passed]


# ------------------------------------------------------------------ what must hold afterwards


@dataclass(frozen=True)
class Evidence:
    """What is on record about one run, each from whoever did it."""

    status: str
    """Temporal's word: COMPLETED, FAILED, …"""
    history: int
    """Number of events."""
    outcome: str | None
    """The `runs` table's word."""
    result: RunResult | None
    ledger: list[Entry]
    effects: list[EffectRow]
    """Of the hospital."""
    requests: list[RequestRow]
    calls: list[CallRow]
    """Of the model."""


@dataclass(frozen=True)
class _Expected:
    """The hospital's words for a tool's effect and for its undo, and the suffix of the key the undo is done under."""

    effect: str
    undo: str = ""
    undo_suffix: str = ""


EFFECTS = {
    "order_medication": _Expected("order", "cancel-order"),
    "book_appointment": _Expected("book", "cancel-booking"),
    "notify_providers": _Expected("message", "retraction", "/undo"),
    "notify_patient": _Expected("message"),
}


def violations(case: Case, found: Evidence) -> list[str]:
    """What is wrong with the run, in words; nothing when all that Holdfast promises was kept."""
    return _ending(case, found) + _effects(case, found) + _model_calls(case, found) + _ledger(case, found)


def unknown(found: Evidence) -> list[str]:
    """The tools whose outcome was left to a person."""
    return [entry.name for entry in found.ledger if entry.state is State.UNKNOWN]


def repeats(found: Evidence) -> int:
    """Model calls beyond the first of each key."""
    return len(found.calls) - len({call.key for call in found.calls})


def _ending(case: Case, found: Evidence) -> list[str]:
    result = found.result
    if result is None:
        return [f"the run did not end: Temporal says {found.status}"]
    wanted = RunOutcome.FAILED if case.flow is Flow.FAILED else RunOutcome.COMPLETED
    if case.flow is Flow.APPROVED and unknown(found):
        wanted = RunOutcome.PARTIAL
        notify = next((step for step in result.steps if step.name == "notify"), None)
        if notify is None or notify.status is not StepStatus.PENDING or not result.pending:
            return ["an UNKNOWN in the ledger, but its step is not pending"]
    temporal = "FAILED" if wanted is RunOutcome.FAILED else "COMPLETED"
    wrong = []
    if (found.status, found.outcome, result.outcome) != (temporal, wanted, wanted):
        ends = f"Temporal {found.status}, store {found.outcome}, result {result.outcome}: {result.reason}"
        wrong.append(f"ended wrong: expected {wanted}, found {ends}")
    if case.flow is Flow.FAILED:
        wrong += [f"undo of {u.tool}: {u.status}: {u.note}" for u in result.undone if u.status != "undone"]
        if (undone := [u.tool for u in reversed(result.undone)])[:1] != ["notify_providers"] or len(undone) != 3:
            wrong.append(f"undone, in this order: {', '.join(undone) or 'nothing'}")
    return wrong


def _effects(case: Case, found: Evidence) -> list[str]:
    """Each effect once, as the hospital counts; what the ledger says has to be what the hospital says."""
    wrong = []
    counted = Counter((effect.kind, effect.key) for effect in found.effects)
    entries = {entry.name: entry for entry in found.ledger if entry.kind == "tool"}
    for tool, expected in EFFECTS.items():
        entry = entries.get(tool)
        if entry is None:
            wrong.append(f"{tool}: not in the ledger")
            continue
        done = counted.pop((expected.effect, entry.key), 0)
        undone = counted.pop((expected.undo, entry.key + expected.undo_suffix), 0)
        right = {
            State.DONE: done == 1 and undone == 0,
            State.COMPENSATED: done == 1 and undone == 1,
            State.FAILED: done == 0 and undone == 0,
            State.UNKNOWN: done <= 1 and undone == 0 and _may_be_unknown(case, tool),
            State.RESERVED: False,
        }
        if not right[entry.state]:
            wrong.append(f"{tool}: the hospital did it {done} times and undid it {undone} times, ledger {entry.state}")
    wrong += [f"{times} × {kind} under {key}, which nobody asked for" for (kind, key), times in counted.items()]
    if _must_be_unknown(case) and "notify_patient" not in unknown(found):
        wrong.append("notify_patient: nobody can know how it ended, and the ledger does not say so")
    return wrong


def _must_be_unknown(case: Case) -> bool:
    return case.where == "notify_patient" and case.point in (Point.RESERVED, Point.EFFECT_DONE)


def _may_be_unknown(case: Case, tool: str) -> bool:
    # The two messages go out in parallel: a worker hit in one of them was perhaps in the middle of the other.
    return tool == "notify_patient" and (_must_be_unknown(case) or case.where == "notify_providers")


def _model_calls(case: Case, found: Evidence) -> list[str]:
    recorded = {entry.key: entry for entry in found.ledger if entry.kind == "model"}
    wrong = []
    # A run that failed has no last turn, in which the others say how it went.
    turns = 4 if case.flow is Flow.FAILED else 5
    if {entry.name for entry in recorded.values()} != {
        *(f"turn-{n + 1}" for n in range(turns)),
        "write_summary/summary",
    }:
        wrong.append(f"model calls on record: {', '.join(sorted(e.name for e in recorded.values()))}")
    for call in found.calls:
        entry = recorded.get(call.key)
        if entry is None or entry.settled_at is None:
            wrong.append(f"a model call that is not on record: {call.key}")
        elif call.received_at > entry.settled_at:
            wrong.append(f"{entry.name}: the model was called again after its answer was recorded")
    unavoidable = 1 if case.point is Point.MODEL_ANSWERED else 0
    if repeats(found) != unavoidable:
        wrong.append(f"{repeats(found)} model calls repeated, {unavoidable} unavoidable")
    return wrong


def _ledger(case: Case, found: Evidence) -> list[str]:
    wrong = [f"{e.key} ({e.name}) is still RESERVED" for e in found.ledger if e.state is State.RESERVED]
    real = {"notify_patient"} if case.flow is Flow.FAILED else set()
    for entry in found.ledger:
        if entry.failures != (1 if entry.name in real and entry.kind == "tool" else 0):
            wrong.append(f"{entry.name}: {entry.failures} failures counted, a crash is none: {entry.error}")
    return wrong


def awakened(before: Evidence, after: Evidence) -> list[str]:
    """What a worker did that was frozen and woke after its work had gone to another: nothing is right."""
    wrong = []
    for what, then, now in (
        ("history", before.history, after.history),
        ("result", (before.outcome, before.result), (after.outcome, after.result)),
        ("ledger", before.ledger, after.ledger),
        ("hospital's effects", before.effects, after.effects),
        # A read may be repeated by anybody at any time.
        ("hospital's requests", _no_reads(before.requests), _no_reads(after.requests)),
        ("model's calls", before.calls, after.calls),
    ):
        if then != now:
            new = [row for row in now if row not in then] if isinstance(then, list) and isinstance(now, list) else now
            wrong.append(f"the worker that woke changed the {what}: {new}")
    return wrong


def _no_reads(requests: list[RequestRow]) -> list[RequestRow]:
    return [request for request in requests if request.service not in READS]
