"""What happens to a run after its end: replays, findings of people, the sweep."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from holdfast.contracts.data import Json
from holdfast.contracts.run import (
    RunOutcome,
    Standing,
)
from holdfast.contracts.tool_call import ToolRequest, UndoStatus
from holdfast.contracts.webhooks import Hook


class Action(BaseModel):
    """One repair after the end of a run.

    call: make the call again, under its key. undo: run its compensation again. settle: record how it ended according to
    a person. ask: let the tool's probe find out.
    """

    do: Literal["call", "undo", "settle", "ask"]
    key: str = ""
    """The ledger key of the call. Empty for a step whose tools were never called, which can only be settled."""
    seq: int = 0
    tool: str = ""
    version: str = "1"
    arguments: Json = {}
    step: str = ""
    timeout_s: float = 10.0
    deadline_s: float = 3600.0
    happened: bool = False
    result: Any = None
    comment: str = ""
    queue: str = ""
    """The stage that the tool runs in."""


class Repair(BaseModel):
    """Input of `RepairWorkflow`. `workflow_id` and `key_base` are those of the run that is repaired.

    Without actions: the run never recorded its end, so the workflow looks up what it left standing and undoes it.
    """

    workflow_id: str
    key_base: str
    agent: str
    tenant: str = "default"
    by: str = ""
    letter: str = ""
    actions: list[Action] = []

    def request(self, action: Action) -> ToolRequest:
        return ToolRequest(
            agent=self.agent,
            key_base=self.key_base,
            seq=action.seq,
            tool=action.tool,
            version=action.version,
            arguments=action.arguments,
            tenant=self.tenant,
        )


class ActionEnd(BaseModel):
    """How an action ended. `words`: what came of it, or why it failed."""

    action: Action
    ok: bool
    words: str
    undo: UndoStatus | None = None


class RepairEnd(BaseModel):
    """Input of the activities that record how a repair ended."""

    repair: Repair
    ends: list[ActionEnd] = []
    webhook: str = ""
    """The webhook address of a run that could not report its end itself."""


class RepairResult(BaseModel):
    """Result of `RepairWorkflow`. `outcome`: the run's outcome after the repair."""

    ok: bool
    words: str
    outcome: RunOutcome | None = None
    hook: Hook | None = None
    """The webhook to send about it."""


class RunRef(BaseModel):
    """Input of the activities `in_doubt` and `to_undo`: a run that ends; its key base may be relative to its id."""

    agent: str
    key_base: str
    tenant: str = "default"


class Past(BaseModel):
    """A call of a run that was reset, as the ledger has it."""

    seq: int
    tool: str
    version: str = "1"
    arguments: Json = {}
    why: str = ""
    """Why it is doubtful."""


class LookBack(BaseModel):
    """Input of the activity `look_back`. seq: the last key that the run has allotted. open: the calls not begun."""

    key_base: str
    seq: int = 0
    open: list[int] = []


class LookedBack(BaseModel):
    """Which effects of a reset run were undone, and which stand. Empty when none was undone."""

    gone: list[Past] = []
    """Calls that were undone."""
    undoing: list[Past] = []
    """Calls whose undo began and is not known to be done."""
    doubtful: list[Past] = []
    """Calls that may have happened, and that the run does not know."""
    standing: list[Standing] = []
    """Effects that stand, and that the run does not know."""
    last: int = 0
    """The last key in use."""


class Survey(BaseModel):
    """What a run without a recorded end has left, the newest first. `alive`: it is open, or its end is recorded."""

    alive: bool = False
    actions: list[Action] = []
    webhook: str = ""


class Sweep(BaseModel):
    """Input of `OrphanSweep`. A run whose newest effect is younger than `grace_s` seconds is left alone."""

    grace_s: float = 120.0


class Swept(BaseModel):
    """Result of `OrphanSweep`: ids of the workflows that unwind the runs it found."""

    found: list[str] = []
    stuck: list[str] = []
    """A line about each run whose history does not replay."""
