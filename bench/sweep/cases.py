"""What the kill sweep tries and what it demands: pure functions over traces and over what is on record about a run.

A case is a crash point at a place (a tool, a turn) of a discharge run, and a way to be hit there. Nothing is listed by
hand: the cases are what undisturbed runs pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from agents.discharge.tools import notify_providers
from holdfast.authoring.services import Service
from holdfast.contracts.data import Json
from holdfast.contracts.run import RunOutcome, RunResult, StepStatus
from holdfast.dev.simulation.hospital import EffectRow, RequestRow
from holdfast.dev.simulation.scripted_model import CallRow
from holdfast.recovery.dead_letters import DeadLetter, LetterState
from holdfast.reliability.breaker import Row
from holdfast.reliability.crash_points import Point
from holdfast.reliability.ledger import Entry, State

READS = ("records", "insurance")
MESSAGES = ("notify_providers", "notify_patient")
"""In this order the physician approves them when something is to go wrong with one of them."""


BOUND_S = notify_providers.timeout_s + (notify_providers.settles_s or 0.0)
"""After its reservation a message to the providers in doubt is sent again, or retracted again, only after this long:
until then a service that says no may still be at work on it.
"""


def waiting(kind: str) -> str:
    """The trace's line for a run that waits for a human; written by the tracer, as workflow code does no I/O."""
    return f"{Point.WAITING}@{kind}"


class Mode(StrEnum):
    KILL = "kill"
    """SIGKILL at the point."""
    FREEZE = "freeze"
    """SIGSTOP at the point, SIGCONT when another worker has ended the run."""


class Flow(StrEnum):
    """What befalls the run apart from the crash."""

    APPROVED = "approved"
    """Nothing: it ends completed."""
    FAILED = "failed"
    """The message to the patient is refused for good after approval, so all that was done is undone."""
    SETTLED = "settled"
    """The message to the patient is answered by 503: a person says that it was not sent, and it is sent anew."""
    ASKED = "asked"
    """The line drops after the message to the providers was sent: the service is asked, and has it."""
    PUT_OFF = "put off"
    """The appointments fail until their breaker opens: the booking is put off, and its next try is the probe."""
    PARTIAL = "partial"
    """The pharmacy never answers: its step is left to the pharmacist."""


@dataclass(frozen=True)
class FlowFault:
    """What goes wrong in a flow, and what that must come to. `fault` is ordered from the hospital's `service`."""

    tool: str
    service: str
    fault: Json
    failures: int
    """Of `tool`, counted by the ledger."""
    outcome: RunOutcome = RunOutcome.COMPLETED
    letters: tuple[tuple[str, str], ...] = ()
    """Kind and subject of the dead letters that the run leaves."""
    places: frozenset[str] = frozenset()
    """Where this flow is another than those before it, besides `tool`."""


RUN = frozenset({"run"})
FLOW_FAULTS = {
    Flow.FAILED: FlowFault(
        "notify_patient",
        "messages",
        {"mode": "fail", "times": 1, "status": 403, "method": "POST"},
        failures=1,
        outcome=RunOutcome.FAILED,
        letters=(("run", "discharge"),),
        places=RUN,
    ),
    Flow.SETTLED: FlowFault(
        "notify_patient",
        "messages",
        {"mode": "fail", "times": 1, "status": 503, "method": "POST"},
        failures=1,
        places=frozenset({"outcome"}),
    ),
    Flow.ASKED: FlowFault("notify_providers", "messages", {"mode": "drop", "times": 1, "method": "POST"}, failures=1),
    Flow.PUT_OFF: FlowFault(
        "book_appointment",
        "appointments",
        {"mode": "fail", "times": 3, "status": 503, "method": "POST"},
        failures=3,
    ),
    Flow.PARTIAL: FlowFault(
        "order_medication",
        "pharmacy",
        {"mode": "hang", "method": "POST"},
        failures=1,
        outcome=RunOutcome.PARTIAL,
        letters=(("call", "order_medication"),),
        places=RUN,
    ),
}


@dataclass(frozen=True)
class Case:
    mode: Mode
    flow: Flow
    point: Point
    where: str

    def fault(self, tenant: str) -> str:
        """The value of HOLDFAST_FAULT for a run of this tenant, which has breakers of its own."""
        where = Service(self.where).target(tenant) if self.point is Point.PROBING else self.where
        return f"{self.mode}:{self.point}@{where}"

    @property
    def in_doubt(self) -> bool:
        """It leaves a request in doubt to which the service says no, so that the run has to wait for the bound."""
        # The retraction of an undo that was done is found, but an undo looks only after the bound.
        points = (Point.RESERVED, Point.UNDO_RESERVED, Point.UNDO_DONE)
        return self.where == "notify_providers" and self.point in points

    @property
    def place(self) -> str:
        return self.where + ("" if self.flow is Flow.APPROVED else f" ({self.flow})")

    def __str__(self) -> str:
        return f"{self.mode}:{self.point}@{self.place}"


def cases(traces: Mapping[Flow, Sequence[str]], mode: Mode) -> list[Case]:
    """Every point at every place that the approved run passes, once; of each other run the points that none before it
    passed, and all points at the places where it is another run than those before.
    """
    found: dict[tuple[str, str], Case] = {}
    passed: set[str] = set()
    for flow in Flow:
        flow_fault = FLOW_FAULTS.get(flow)
        own = flow_fault.places | {flow_fault.tool} if flow_fault else frozenset()
        lines = [line.partition("@") for line in traces[flow]]
        for point, _, where in lines:
            if where in own or point not in passed:
                found.setdefault((f"{point}@{where}", flow), Case(mode, flow, Point(point), where))
        passed |= {point for point, _, _ in lines}
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
    letters: list[DeadLetter]
    breakers: list[Row]
    """Of the run's tenant, which is its own."""
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
    checks = (_ending, _effects, _settlements, _model_calls, _ledger, _letters, _breakers)
    return [wrong for check in checks for wrong in check(case, found)]


def settled(found: Evidence) -> list[str]:
    """The tools whose outcome a person had to settle, once for each call."""
    decisions = found.result.decisions if found.result else []
    return [each.approval.subject for each in decisions if each.approval.kind == "outcome"]


def repeats(found: Evidence) -> int:
    """Model calls beyond the first of each key."""
    return len(found.calls) - len({call.key for call in found.calls})


def _ending(case: Case, found: Evidence) -> list[str]:
    result = found.result
    if result is None:
        return [f"the run did not end: Temporal says {found.status}"]
    wanted = FLOW_FAULTS[case.flow].outcome if case.flow in FLOW_FAULTS else RunOutcome.COMPLETED
    temporal = "FAILED" if wanted is RunOutcome.FAILED else "COMPLETED"
    wrong = []
    if (found.status, found.outcome, result.outcome) != (temporal, wanted, wanted):
        ends = f"Temporal {found.status}, store {found.outcome}, result {result.outcome}: {result.reason}"
        wrong.append(f"ended wrong: expected {wanted}, found {ends}")
    if wanted is RunOutcome.FAILED:
        wrong += [f"undo of {u.tool}: {u.status}: {u.note}" for u in result.undone if u.status != "undone"]
        if (undone := [u.tool for u in reversed(result.undone)])[:1] != ["notify_providers"] or len(undone) != 3:
            wrong.append(f"undone, in this order: {', '.join(undone) or 'nothing'}")
        return wrong
    left = ["pharmacy"] if wanted is RunOutcome.PARTIAL else []
    open_steps = [step.name for step in result.steps if step.status is not StepStatus.DONE]
    if (open_steps, [pending.step for pending in result.pending]) != (left, left):
        wrong.append(f"steps not done: {open_steps}, pending: {result.pending}")
    return wrong


def _effects(case: Case, found: Evidence) -> list[str]:
    """Each effect once, as the hospital counts; what the ledger says has to be what the hospital says."""
    wrong = []
    counted = Counter((effect.kind, effect.key) for effect in found.effects)
    for tool, expected in EFFECTS.items():
        entries = [entry for entry in found.ledger if (entry.kind, entry.name) == ("tool", tool)]
        times = 0
        for entry in entries:
            done = counted.pop((expected.effect, entry.key), 0)
            undone = counted.pop((expected.undo, entry.key + expected.undo_suffix), 0)
            right = {
                State.DONE: done == 1 and undone == 0,
                State.COMPENSATED: done == 1 and undone == 1,
                State.FAILED: done == 0 and undone == 0,
                # Of a pharmacy that hangs nobody knows; a message is settled in the end.
                State.UNKNOWN: done == 0 and (case.flow, tool) == (Flow.PARTIAL, "order_medication"),
                State.RESERVED: False,
            }
            if not right[entry.state]:
                wrong.append(
                    f"{entry.key} ({tool}): the hospital did it {done} times and undid it {undone} times,"
                    f" ledger {entry.state}"
                )
            times += done
        never = case.flow in (Flow.FAILED, Flow.PARTIAL) and FLOW_FAULTS[case.flow].tool == tool
        if times != (0 if never else 1) or not entries:
            wrong.append(f"{tool}: done {times} times under {len(entries)} keys")
    wrong += [f"{times} × {kind} under {key}, which nobody asked for" for (kind, key), times in counted.items()]
    return wrong


def _settlements(case: Case, found: Evidence) -> list[str]:
    """A person is asked when nobody else can know how the message to the patient ended, and only then."""
    asked = settled(found)
    least = 1 if case.flow is Flow.SETTLED else 0
    if case.where == "notify_patient" and case.point in (Point.RESERVED, Point.EFFECT_DONE):
        least += 1
    # The two messages go out in parallel: a worker hit in one of them was perhaps in the middle of the other.
    most = least + (1 if case.where == "notify_providers" else 0)
    if set(asked) - {"notify_patient"} or not least <= len(asked) <= most:
        return [f"asked a person how these calls ended: {asked}; expected {least} to {most} of notify_patient"]
    return []


def _model_calls(case: Case, found: Evidence) -> list[str]:
    recorded = {entry.key: entry for entry in found.ledger if entry.kind == "model"}
    wrong = []
    turns = found.result.turns if found.result else 0
    # A run that failed has no last turn, in which the others say how it went. What was settled or put off is heard of
    # in a turn that says so again, or that calls the tool once more.
    least = 4 if case.flow is Flow.FAILED else 5
    most = least + 2 * len(settled(found)) + (1 if case.flow is Flow.PUT_OFF else 0)
    if not least <= turns <= most:
        wrong.append(f"{turns} turns, expected {least} to {most}")
    if sorted(entry.name for entry in recorded.values()) != [f"turn-{n + 1}" for n in range(turns)] + [
        "write_summary/summary"
    ]:
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
    """No row is left open, and no crash is counted as a failure."""
    wrong = [f"{e.key} ({e.name}) is still RESERVED" for e in found.ledger if e.state is State.RESERVED]
    counted = Counter[str]()
    for entry in found.ledger:
        counted[f"{entry.kind} {entry.name}"] += entry.failures
    flow_fault = FLOW_FAULTS.get(case.flow)
    if +counted != Counter({f"tool {flow_fault.tool}": flow_fault.failures} if flow_fault else {}):
        errors = "; ".join(f"{entry.key}: {entry.error}" for entry in found.ledger if entry.error)
        wrong.append(f"failures counted, a crash is none: {dict(+counted)}: {errors}")
    return wrong


def _letters(case: Case, found: Evidence) -> list[str]:
    wanted = list(FLOW_FAULTS[case.flow].letters) if case.flow in FLOW_FAULTS else []
    got = [(letter.kind, letter.subject, letter.state) for letter in found.letters]
    right = [(kind, subject, LetterState.OPEN) for kind, subject in wanted]
    return [] if got == right else [f"dead letters: {got}, expected {right}"]


def _breakers(case: Case, found: Evidence) -> list[str]:
    """All closed again; of a service that was down no more was asked than the rule lets through."""
    wrong = [
        f"breaker of {row.target} left {row.state} with {row.failures} failures, prober {row.prober or 'none'}"
        for row in found.breakers
        if row.state != "closed"
    ]
    if case.flow is Flow.PUT_OFF:
        asked = [r.status for r in found.requests if (r.service, r.method) == ("appointments", "POST")]
        # A prober that dies after the effect repeats it under its key; nobody else may probe meanwhile.
        probes = 2 if (case.point, case.where) == (Point.EFFECT_DONE, "book_appointment") else 1
        if asked != [503] * 3 + [201] * probes:
            wrong.append(f"the appointments were asked: {asked}, expected three failures and {probes} × 201")
        if not any(row.since for row in found.breakers if row.target.startswith("appointments")):
            wrong.append("the breaker of the appointments never opened")
    return wrong


def awakened(before: Evidence, after: Evidence) -> list[str]:
    """What a worker did that was frozen and woke after its work had gone to another: nothing is right."""
    wrong = []
    for what, then, now in (
        ("history", before.history, after.history),
        ("result", (before.outcome, before.result), (after.outcome, after.result)),
        ("ledger", before.ledger, after.ledger),
        ("dead letters", before.letters, after.letters),
        ("breakers", before.breakers, after.breakers),
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
