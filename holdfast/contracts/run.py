"""A run: its input, its steps, its status and its result."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from holdfast.contracts.data import Json
from holdfast.contracts.people import Approval, DecidedApproval
from holdfast.contracts.tool_call import UndoStatus
from holdfast.contracts.turn import Usage


class RunOutcome(StrEnum):
    COMPLETED = "completed"
    PARTIAL = "partial"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def unwinds(self) -> bool:
        return self not in (RunOutcome.COMPLETED, RunOutcome.PARTIAL)

    @property
    def exit_code(self) -> int:
        """Exit status of `starter.py run --wait`."""
        return {"completed": 0, "partial": 3, "rejected": 4, "failed": 1, "cancelled": 5}[self.value]


class StepStatus(StrEnum):
    TODO = "todo"
    ACTIVE = "active"
    WAITING = "waiting"
    """Waits for a person's approval."""
    DONE = "done"
    PENDING = "pending"
    """Left for a person (`role`) to settle."""
    FAILED = "failed"
    REJECTED = "rejected"
    UNDONE = "undone"


class StepState(BaseModel):
    name: str
    status: StepStatus = StepStatus.TODO
    critical: bool = True
    role: str = ""
    detail: str = ""
    seq: int | None = None
    """The call that gave the step its status, when it did not succeed."""
    title: str = ""
    origin: str = ""
    """The fallback that answered in place of the step's tool."""
    eta: datetime | None = None


class UndoRecord(BaseModel):
    """One compensation that is registered for a run."""

    seq: int
    tool: str
    version: str = "1"
    arguments: Json = {}
    step: str = ""
    status: UndoStatus = UndoStatus.REGISTERED
    note: str = ""


class Stands(BaseModel):
    """An effect that still stands outside, although the run was unwound."""

    seq: int
    tool: str
    why: str = ""
    """Why it was not undone."""

    def __str__(self) -> str:
        return f"{self.tool} #{self.seq}"


NO_UNDO = "it has no undo"


def not_undone(records: list[UndoRecord]) -> list[Stands]:
    """Returns the effects whose compensation failed."""
    return [Stands(seq=r.seq, tool=r.tool, why="its undo failed") for r in records if r.status is UndoStatus.FAILED]


class Pending(BaseModel):
    """A step that a person must settle after the run."""

    step: str
    role: str
    what: str
    key: str = ""
    """The ledger key of the call in question."""


def percent(steps: list[StepState]) -> int:
    """Returns the share of steps that are done, 0…100; 0 for an agent without steps."""
    return 100 * sum(step.status is StepStatus.DONE for step in steps) // len(steps) if steps else 0


def awaiting(steps: list[StepState], pending: list[Pending]) -> str:
    """Returns why a run is partial: '83 % complete, awaiting Pharmacy coordination (pharmacist)'."""
    titles = {step.name: step.title for step in steps}
    left = ((titles.get(each.step) or each.step) + (f" ({each.role})" if each.role else "") for each in pending)
    return f"{percent(steps)} % complete, awaiting {', '.join(left)}"


class Items(BaseModel):
    """Counts of a batch's items. `failed`: ended in any way but completed. `parked`: open, and waiting."""

    total: int = 0
    done: int = 0
    failed: int = 0
    open: int = 0
    parked: int = 0

    @property
    def ended(self) -> int:
        return self.done + self.failed

    @property
    def percent(self) -> int:
        return 100 * self.ended // self.total if self.total else 0


class RunResult(BaseModel):
    """The result of a run: the Temporal result, the details of a failed run, and the `result` column of the store."""

    outcome: RunOutcome
    summary: str = ""
    reason: str = ""
    """Why the run did not complete; empty when it did."""
    agent: str = ""
    key_base: str = ""
    steps: list[StepState] = []
    pending: list[Pending] = []
    undone: list[UndoRecord] = []
    usage: Usage = Usage()
    model: str = ""
    turns: int = 0
    calls: int = 0
    failures: int = 0
    human_wait_s: float = 0.0
    decisions: list[DecidedApproval] = []
    trace_id: str = ""
    percent: int = 0
    models: dict[str, int] = {}
    """Turns per model, when more than one model answered."""
    notes: list[str] = []
    """Unusual events of the run, newest last."""
    items: Items | None = None
    """Of a batch."""
    webhook: str = ""
    """The webhook address; it also gets the repairs made after the run's end."""
    stands: list[Stands] = []
    """For a run that was unwound: its effects that still stand."""
    since: list[str] = []
    """Steps that were pending at the run's end and have been done since; `summary` then says so."""
    said: str = ""
    """The agent's final answer, once `since` has made it out of date."""


class Phase(StrEnum):
    """The phase of a run; also the search attribute `HoldfastStatus`."""

    STARTING = "starting"
    RUNNING = "running"
    PARKED = "parked"
    """A timer will retry: the model is unavailable, a service is down, or a rate limit is reached."""
    WAITING_HUMAN = "waiting-human"
    COMPENSATING = "compensating"
    ENDED = "ended"


class RunStatus(BaseModel):
    """Answer of the query `status`."""

    agent: str
    phase: Phase
    line: str
    """One sentence: '4/6 steps complete; pharmacy pending pharmacist'."""
    percent: int = 0
    steps: list[StepState] = []
    approvals: list[Approval] = []
    notes: list[str] = []
    """Ignored or unusual events, newest last: invalid, late and duplicate decisions, unavailable models."""
    turn: int = 0
    calls: int = 0
    usage: Usage = Usage()
    model: str = ""
    key_base: str = ""
    trace_id: str = ""
    undone: list[UndoRecord] = []
    outcome: RunOutcome | None = None
    items: Items | None = None
    """Of a batch."""
    stands: list[Stands] = []
    """For a run that unwinds: its effects that still stand."""


class Standing(BaseModel):
    """An effect of an earlier run of this work that still stands: it answers one call of this tool."""

    tool: str
    key: str
    """Idempotency key of the earlier call."""
    content: str
    """The text for the model."""


class AgentInput(BaseModel):
    """Input of `AgentWorkflow`. A person may type it: `{"agent": "discharge", "input": {"patient_id": "pat-1"}}`."""

    agent: str
    input: Json = {}
    request_key: str = ""
    requested_by: str = ""
    tenant: str = "default"
    trace_id: str = ""
    standing: list[Standing] = []
    """Set when a failed run is replayed, so that no effect of the first run happens twice."""
    webhook: str = ""
    """Webhook address, called when the run needs input and when it has ended; empty: none."""
    state: dict[str, Any] | None = None
    """Set by continue-as-new only: the dumped `RunState` of `workflows.agent`."""


class RunEnd(BaseModel):
    """Input of the activity that records how a run ended."""

    tenant: str = "default"
    result: RunResult
    input: Json | None = None
    """The run's input, if it failed: its dead letter is replayed with it."""
    requested_by: str = ""
