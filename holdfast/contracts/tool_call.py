"""A tool call and its undo: the requests of the activities, and the outcomes that they return."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, Field

from holdfast.contracts.data import Json
from holdfast.contracts.turn import MayWait, OutcomeStatus, Usage


def key_base(workflow_id: str, first_run_id: str) -> str:
    """Returns the prefix of a run's idempotency keys. It is new for each run, also when a workflow id is reused."""
    return f"{workflow_id}/{first_run_id[-12:]}"


def absolute(base: str, workflow_id: str) -> str:
    """Completes a key base that begins with a slash: the sending workflow leaves its id out, to keep history small."""
    return workflow_id + base if base.startswith("/") else base


class ToolRequest(BaseModel):
    """Input of the tool and undo activities. The idempotency key is `key_base/seq` (of an undo `…/undo`)."""

    agent: str
    key_base: str
    seq: int
    tool: str
    version: str = "1"
    arguments: Json = {}
    tenant: str = "default"

    @property
    def key(self) -> str:
        return f"{self.key_base}/{self.seq}"


class GiveUp(BaseModel):
    """Input of the activity `give_up`: a call that is no longer retried, and why."""

    request: ToolRequest
    why: str


class Outcome(MayWait):
    """How one tool call ended."""

    status: OutcomeStatus = OutcomeStatus.OK
    content: str = ""
    """The text for the model."""
    reason: str = ""
    """The text for people when the call did not succeed."""
    failures: int = 0
    """Failed attempts (crashes and deploys do not count)."""
    usage: Usage = Usage()
    """Usage of the tool's own model calls."""
    origin: str = ""
    """The fallback that answered: another tool, the last good result and its age, a template; empty: the tool."""
    known: str = ""
    """For an unknown outcome: attempt, worker and time, for the person who settles it."""
    notes: list[str] = Field(default=[])
    """Notes for readers of the run, e.g. that a circuit breaker closed."""


class UndoStatus(StrEnum):
    REGISTERED = "registered"
    UNDONE = "undone"
    NOTHING = "nothing"
    """The effect never happened, so there was nothing to undo."""
    FAILED = "failed"


class UndoOutcome(MayWait):
    status: UndoStatus
    note: str = ""
    failures: int = 0


class Checked(BaseModel):
    """Result of the activity `check`, which validates arguments that a person has edited."""

    arguments: Json = {}
    """The validated arguments, with defaults filled in."""
    problem: str = ""
    """Why the arguments are not valid; empty when they are."""
