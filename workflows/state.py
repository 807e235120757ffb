"""The state of a run: one serialisable object, carried whole over continue-as-new, and what is derived from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import BaseModel, Field

from holdfast.contracts.people import Approval, ApprovalDecision, DecidedApproval
from holdfast.contracts.profile import Effect, Profile, StepSpec, ToolPolicy
from holdfast.contracts.run import (
    NO_UNDO,
    Pending,
    Phase,
    RunOutcome,
    Standing,
    Stands,
    StepState,
    StepStatus,
    UndoRecord,
    not_undone,
)
from holdfast.contracts.tool_call import Outcome, UndoStatus
from holdfast.contracts.turn import OutcomeStatus, Reply, ToolCall, Usage, Wait

NOTE_TIME = len("2026-11-21 12:00:00 ")
"""Length of the timestamp that a note begins with."""


@dataclass(frozen=True)
class Ending:
    """How the run ends. `summary`: the model's final words, if any."""

    outcome: RunOutcome
    reason: str = ""
    summary: str = ""


class CallState(BaseModel):
    """One call of the turn that is being carried out."""

    call: ToolCall
    seq: int
    outcome: Outcome | None = None
    edits: list[str] = []
    """For each edit of the arguments that the tool did not accept: what was wrong with it."""
    edited_by: str = ""
    acting: bool = False
    """It has passed the gate."""


class ToolEnd(BaseModel):
    """How the last finished call of a tool ended. An ERROR does not count: the model may correct the call."""

    status: OutcomeStatus
    seq: int
    detail: str = ""
    origin: str = ""


class Doubt(BaseModel):
    """A call that may have happened, of a tool whose `ToolEnd` is by now that of another, parallel call."""

    tool: str
    seq: int
    detail: str = ""


def tried_again(wait: Wait | Deferred) -> str:
    return f"{wait.why}; tried again at {wait.until:%H:%M:%S} UTC"


class Deferred(BaseModel):
    """A call that is deferred because its service is down. Tried again at `until`; given up at its deadline."""

    call: ToolCall
    seq: int
    until: datetime
    since: datetime
    why: str

    @property
    def words(self) -> str:
        return tried_again(self)


class ApprovalsState(BaseModel):
    open: dict[str, Approval] = {}
    decided: dict[str, DecidedApproval] = {}
    asked_since: datetime | None = None
    """When the run began to wait for a person; None while it waits for no answer."""
    waited_s: float = 0.0
    """Seconds waited before `asked_since`."""
    held: list[str] = []
    """Requests of kind `outcome` that the run cannot end without."""
    withdrawn: dict[str, str] = {}
    """Requests that no longer need an answer, and why."""
    early: list[ApprovalDecision] = []
    """The last decisions about requests that were not open. They count only if the run was reset after them."""
    recalled: dict[str, list[ApprovalDecision]] = {}
    """Early decisions that the server sent again after a reset, by request. As soon as it is open again, the first one
    that fits counts."""

    @property
    def blocking(self) -> list[Approval]:
        """The open requests that the run waits for."""
        return [a for a in self.open.values() if a.kind != "outcome" or a.id in self.held]

    def asked(self, approval_id: str) -> bool:
        return approval_id in self.open or approval_id in self.decided


class RunState(BaseModel):
    key_base: str
    started: datetime
    phase: Phase = Phase.STARTING
    turn: int = 0
    planning: bool = False
    """The turn has begun and has not answered."""
    seq: int = 0
    base: str | None = None
    """The checkpoint that the next turn continues from."""
    answers: list[str] = []
    statuses: list[OutcomeStatus] = []
    """Of the answers; empty when all are ok."""
    notices: list[str] = []
    """Notices for the next turn."""
    heard: int | None = None
    """How many notices the turn that waits for answers has read; None while no turn waits for answers."""
    asked: list[str] = []
    """Ids of the questions that this turn has asked, in their order."""
    replies: list[Reply] = []
    """Their answers so far."""
    calls: list[CallState] = []
    profile: Profile | None = None
    ends: dict[str, ToolEnd] = {}
    """By tool."""
    doubts: list[Doubt] = []
    """Unknown calls that `ends` does not show."""
    refused: dict[str, str] = {}
    """By tool without an end: the text of the last call that ended in an error."""
    saga: list[UndoRecord] = []
    approvals: ApprovalsState = ApprovalsState()
    notes: list[str] = []
    usage: Usage = Usage()
    """Of turns and calls that have ended."""
    spent: dict[str, Usage] = {}
    """Of those that have not: of the current turn ("turn"), and of calls, by their number."""
    model: str = ""
    failures: int = 0
    refusals: int = 0
    repeats: int = 0
    last_turn: str = ""
    deferred: list[Deferred] = []
    final: str | None = None
    """The model's final words, kept until the run ends or goes on: it may first wait for what must be settled."""
    models: dict[str, int] = {}
    """Turns by the model that answered."""
    refused_turns: int = 0
    settled: list[str] = []
    """Requests of kind `outcome` whose answers are recorded in the ledger."""
    stood: list[str] = []
    """Keys of the standing effects that have already answered a call."""
    withdrawn: list[str] = []
    """Tools that the last turn could not use because their service does not answer."""
    offered: dict[str, datetime] = {}
    """Withdrawn tools that are offered again because the model wanted to end without them, and since when."""
    waits: list[Wait] = Field(default=[], exclude=True)
    """What activities wait for right now. Not carried: a waiting activity asks again."""
    standing: list[Standing] = []
    """Effects after the point of a Reset that still stand: each answers a call of its tool."""
    look_back_due: bool = False
    """The run was reset and has not looked back yet: it decides, starts and ends nothing until it has."""
    was_reset: bool = False
    """The run was reset: effects may stand that this execution has not reached."""
    void_turn: int = 0
    """The turn whose calls were decided before the run learned what was undone before a Reset."""
    told: int = 0
    """How many Signals the batch that started this run got from it."""
    told_waits: bool = False
    """The last of them said that the run waits."""
    lasting: list[Stands] = []
    """Effects that this run cannot undo, in the order in which their calls ended."""

    def policy(self, tool: str) -> ToolPolicy | None:
        """The rules of a tool as they were when the run began; None for a tool that is newer than the run."""
        return self.profile.tools.get(tool) if self.profile else None

    def places(self) -> int:
        """How many tool calls may run at a time; 0: any number."""
        return self.profile.parallel_calls if self.profile else 0

    def account(self, item: CallState) -> None:
        """Counts the outcome of a call and keeps it as its tool's end."""
        outcome = item.outcome
        assert outcome is not None
        self.failures += outcome.failures
        self.spent.pop(str(item.seq), None)
        self.usage += outcome.usage
        if outcome.status is OutcomeStatus.OK:
            self.lasts(item.call.tool, item.seq, outcome.origin)
            self.stood += [each.key for each in self.standing if each.key == self.key_of(item.seq)]
        if outcome.status is not OutcomeStatus.ERROR:
            detail = "" if outcome.status is OutcomeStatus.OK else (outcome.reason or outcome.content)[:300]
            end = ToolEnd(status=outcome.status, seq=item.seq, detail=detail, origin=outcome.origin)
            self.ended(item.call.tool, end)
            self.refused.pop(item.call.tool, None)
        else:
            self.refused[item.call.tool] = outcome.content[:300]

    def ended(self, tool: str, end: ToolEnd) -> None:
        """Keeps the end of a call as its tool's end. Another call of the tool that is unknown stays so."""
        before = self.ends.get(tool)
        if before and before.status is OutcomeStatus.UNKNOWN and before.seq != end.seq:
            self.doubts.append(Doubt(tool=tool, seq=before.seq, detail=before.detail))
        self.resolved(end.seq)
        self.ends[tool] = end

    def resolved(self, seq: int) -> bool:
        """Takes a call out of `doubts`. False when it is not among them."""
        kept = [each for each in self.doubts if each.seq != seq]
        found = len(kept) < len(self.doubts)
        self.doubts = kept
        return found

    def lasts(self, tool: str, seq: int, origin: str) -> None:
        """Records that a call is done, if it has an effect that the saga does not undo."""
        policy = self.policy(tool)
        if policy and policy.effect is not Effect.READ and all(record.seq != seq for record in self.saga):
            # A tool with an undo is missing from the saga only when the effect belongs to an earlier run.
            self.lasting.append(Stands(seq=seq, tool=tool, why=origin if policy.undo else NO_UNDO))

    def stands(self) -> list[Stands]:
        """The effects that remain when the run has been unwound."""
        return sorted(self.lasting + not_undone(self.saga), key=lambda each: each.seq)

    @property
    def used(self) -> Usage:
        """The model usage of the whole run so far."""
        return sum(self.spent.values(), self.usage)

    def open_tools(self) -> list[str]:
        """Tools of critical steps that have no outcome; empty once a person's rejection allows the run to end."""
        found = zip(self._specs(), self.steps(), strict=True)
        steps = [(spec, step.status) for spec, step in found if spec.critical]
        if any(status is StepStatus.REJECTED for _, status in steps):
            return []
        return [
            tool for spec, status in steps if status is StepStatus.TODO for tool in spec.tools if tool not in self.ends
        ]

    def found_out(self, tool: str, seq: int, status: OutcomeStatus) -> None:
        """Applies what a service says of an unknown call: OK, FAILED, or still UNKNOWN."""
        end = self.ends.get(tool)
        if status is not OutcomeStatus.UNKNOWN:
            self.resolved(seq)
        if end and end.seq == seq and status is OutcomeStatus.FAILED:
            del self.ends[tool]
        elif status is OutcomeStatus.OK:
            self.lasts(tool, seq, "")
            if end is None or end.seq == seq:
                self.ends[tool] = ToolEnd(status=OutcomeStatus.OK, seq=seq)

    def unknown(self, tool: str) -> int | None:
        """Number of the call of this tool whose outcome is unknown, if there is one."""
        return next((each.seq for each in self.in_doubt() if each.tool == tool), None)

    def in_doubt(self) -> list[Doubt]:
        """All calls that may have happened and are not settled."""
        ends = self.ends.items()
        last = [Doubt(tool=t, seq=e.seq, detail=e.detail) for t, e in ends if e.status is OutcomeStatus.UNKNOWN]
        return last + self.doubts

    def deferred_call(self, tool: str) -> Deferred | None:
        """The deferred call of this tool, if there is one."""
        return next((each for each in self.deferred if each.call.tool == tool), None)

    def step_of(self, tool: str) -> StepSpec | None:
        return next((s for s in self._specs() if tool in s.tools), None)

    def steps(self) -> list[StepState]:
        """Where each step of the agent stands."""
        running = {call.call.tool for call in self.calls if call.outcome is None}
        return [self._step(spec, running) for spec in self._specs()]

    def pending(self) -> list[Pending]:
        """What a person has to settle after the run."""
        steps = self.steps()
        left = [
            Pending(step=s.name, role=s.role, what=s.detail or "not done", key=self.key_of(s.seq))
            for s in steps
            if s.status is StepStatus.PENDING or (s.status is StepStatus.TODO and not s.critical)
        ]
        said = {each.key for each in left}
        return left + [
            Pending(step=each.tool, role=self._role(each.tool), what=each.detail, key=key)
            for each in self.in_doubt()
            if (key := self.key_of(each.seq)) not in said
        ]

    def missing(self) -> dict[str, list[str]]:
        """By step without an outcome: its tools that were withdrawn and not offered again since."""
        todo = {step.name for step in self.steps() if step.status is StepStatus.TODO}
        gone = {*self.withdrawn} - {*self.offered, *self.ends}
        specs = [spec for spec in self._specs() if spec.name in todo and gone.intersection(spec.tools)]
        return {spec.name: [tool for tool in spec.tools if tool in gone] for spec in specs}

    def owed(self) -> list[str]:
        """Tools that were offered again and have no end since."""
        return [tool for tool in self.offered if tool not in self.ends]

    def lost(self) -> list[str]:
        """The tools of `owed` that the last turn could not use."""
        return [tool for tool in self.owed() if tool in self.withdrawn]

    def patience(self) -> datetime | None:
        """Until when the next turn may wait for the tools of `lost`."""
        ends = (self.offered[t] + timedelta(seconds=p.deadline_s) for t in self.lost() if (p := self.policy(t)))
        return max(ends, default=None)

    def stray_tools(self) -> list[str]:
        """Tools with an end that belong to no step."""
        in_steps = {tool for spec in self._specs() for tool in spec.tools}
        return [tool for tool in self.ends if tool not in in_steps]

    def stage(self) -> str:
        """The current step, for the search attribute."""
        steps = self.steps()
        busy = (StepStatus.WAITING, StepStatus.ACTIVE)
        return next((s.name for status in busy for s in steps if s.status is status), "")

    def doing(self) -> str:
        """What the run is doing, in words."""
        match self.phase:
            case Phase.WAITING_HUMAN:
                return "Waiting for a human: " + _names(a.subject for a in self.approvals.blocking)
            case Phase.PARKED if self.final is not None:
                again = (f"{each.call.tool} at {each.until:%H:%M:%S} UTC ({each.why})" for each in self.deferred)
                return f"Trying again: {', '.join(again)}"
            case Phase.PARKED if self.waits:
                return f"Parked: {'; '.join(dict.fromkeys(map(tried_again, self.waits)))}"
            case Phase.PARKED:
                return f"Parked: {self.notes[-1][NOTE_TIME:]}" if self.notes else "Parked"
            case Phase.COMPENSATING:
                left = _names(f"{u.tool} (#{u.seq})" for u in reversed(self.saga) if u.status is UndoStatus.REGISTERED)
                held = f". Parked: {'; '.join(dict.fromkeys(map(tried_again, self.waits)))}" if self.waits else ""
                return f"Still to be undone: {left}{held}" if left else "Undoing what was done"
            case _:
                running = _names(c.call.tool for c in self.calls if c.outcome is None)
                return f"Running {running}" if running else f"Thinking (turn {self.turn})"

    def _specs(self) -> list[StepSpec]:
        return self.profile.steps if self.profile else []

    def _role(self, tool: str) -> str:
        step = self.step_of(tool)
        return step.role if step else ""

    def key_of(self, seq: int | None) -> str:
        """The idempotency key of a call; empty without a call."""
        return f"{self.key_base}/{seq}" if seq else ""

    def _step(self, spec: StepSpec, running: set[str]) -> StepState:
        ends = [self.ends[tool] for tool in spec.tools if tool in self.ends]
        doubts = [
            ToolEnd(status=OutcomeStatus.UNKNOWN, seq=each.seq, detail=each.detail)
            for each in self.doubts
            if each.tool in spec.tools
        ]
        worst = next((e for bad in _BAD for e in ends + doubts if e.status is bad), None)
        done = sum(end.status is OutcomeStatus.OK for end in ends)
        failed = [worst.detail] if worst else []
        if spec.one_of and worst and worst.status is OutcomeStatus.FAILED and (done or len(ends) < len(spec.tools)):
            worst = None
        questions = [a for a in self.approvals.open.values() if a.subject in spec.tools]
        waiting = {a.subject for a in questions if a.kind == "tool"}
        undone = {r.tool for r in self.saga if r.status is UndoStatus.UNDONE}
        refused = (self.refused[tool] for tool in spec.tools if tool in self.refused and tool not in self.ends)
        detail = worst.detail if worst else "; ".join([*failed, *refused])
        if worst and worst.status is OutcomeStatus.DEFERRED:  # the time of the next attempt changes with every attempt
            detail = next((each.words for each in self.deferred if each.call.tool in spec.tools), detail)
        status = StepStatus.TODO
        if undone.intersection(spec.tools):
            status = StepStatus.UNDONE
        elif waiting.intersection(spec.tools):
            status = StepStatus.WAITING
        elif running.intersection(spec.tools):
            status = StepStatus.ACTIVE
        elif worst:
            status = _BAD[worst.status]
            if status is StepStatus.FAILED and not spec.critical:
                status = StepStatus.PENDING
        elif (spec.one_of and done) or len(ends) == len(spec.tools):
            status = StepStatus.DONE
        return StepState(
            name=spec.name,
            status=status,
            critical=spec.critical,
            role=spec.role,
            detail=detail,
            seq=(worst.seq or None) if worst else None,
            title=spec.title,
            origin="; ".join(end.origin for end in ends if end.origin),
            eta=max((a.eta for a in questions if a.eta), default=None),
        )


def _names(tools: Iterable[str]) -> str:
    """'book, send (12 times)'"""
    return ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in Counter(tools).items())


_BAD = {
    OutcomeStatus.FAILED: StepStatus.FAILED,
    OutcomeStatus.REJECTED: StepStatus.REJECTED,
    OutcomeStatus.UNKNOWN: StepStatus.PENDING,
    OutcomeStatus.DEFERRED: StepStatus.PENDING,
}
"""Ends that decide a step, the worst first. A failed optional step is pending: a person handles it."""
