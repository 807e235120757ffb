"""A turn: the request of the plan activity, and the decision that it returns."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from holdfast.contracts.data import Json
from holdfast.contracts.profile import Profile


class Usage(BaseModel):
    """Model usage. `cost_usd` covers calls with a known price; `unpriced` counts the other calls."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    unpriced: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            calls=self.calls + other.calls,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cost_usd=round(self.cost_usd + other.cost_usd, 9),
            unpriced=self.unpriced + other.unpriced,
        )


class ToolCall(BaseModel):
    """One validated tool call of a decision. Only the conversation has the model's id of the call."""

    tool: str
    arguments: Json = {}
    version: str = "1"


class Decision(BaseModel):
    """The decision of one turn: calls to make, or the run's final answer. Exactly one of the two."""

    calls: list[ToolCall] = []
    final: str | None = None


class Wait(BaseModel):
    """Asks the workflow to call the activity again at `until`. It is a result, so it uses up no retry."""

    until: datetime
    why: str
    service: str = ""
    """Set when this service's circuit breaker is open: the call may be deferred while other work goes on."""


class MayWait(BaseModel):
    """The result of an activity that may ask to be called again."""

    wait: Wait | None = None


class Question(BaseModel):
    """A question that a graph asks a person by `interrupt()`. `id`: LangGraph's id of the interrupt."""

    id: str
    text: str
    data: Any = None
    """The interrupt's value as JSON, when it is not just a text."""


class Reply(BaseModel):
    """A person's answer to a question, as JSON. `interrupt()` returns `value`."""

    id: str
    value: Any = None


class OutcomeStatus(StrEnum):
    OK = "ok"
    ERROR = "error"
    """The caller's mistake (bad arguments, unknown tool, 400): the model can act on it."""
    FAILED = "failed"
    """It certainly did not happen, and a retry would not help (or the retries are used up)."""
    UNKNOWN = "unknown"
    """It may have happened; it is never retried blindly."""
    REJECTED = "rejected"
    """A person rejected it."""
    DEFERRED = "deferred"
    """Deferred while its service's circuit breaker is open; the platform retries it."""


class PlanRequest(BaseModel):
    """Input of the plan activity. `base`: the checkpoint that the turn goes on from. `input`: in turn 1 only."""

    agent: str
    key_base: str
    turn: int
    base: str | None = None
    answers: list[str] = []
    """The answers to the previous turn's calls, in order."""
    notices: list[str] = []
    """The platform's notices for the model."""
    input: Json | None = None
    tenant: str = "default"
    replies: list[Reply] = []
    """All answers to this turn's questions so far, oldest first. Not part of the turn's identity."""
    statuses: list[OutcomeStatus] = []
    """How the previous turn's calls ended, in order; empty when all are ok."""
    offered: list[str] = []
    """Tools to offer although their service does not answer, because the run cannot end well without them."""
    open: list[str] = []
    """Tools of critical steps without an outcome: the run cannot end without them. In turn 1 the spec says which."""
    tried: bool = False
    """The turn has already asked a model and then had to wait: the ledger has the usage of that call."""


class PlanResult(MayWait):
    """A decision with the checkpoint it is stored in, or a wait. `profile` is set in turn 1 only.

    `usage` covers the whole turn so far, including calls that were cut.
    """

    calls: list[ToolCall] = []
    final: str | None = None
    checkpoint: str = ""
    usage: Usage = Usage()
    model: str = ""
    """The model that answered, as the endpoint names it; empty when it is the previous turn's."""
    profile: Profile | None = None
    notes: list[str] = []
    """Notes for readers of the run: a fallback that answered, tools that were withdrawn."""
    refusal: str = ""
    """Why the model refuses the turn by its policy; only a person can help."""
    questions: list[Question] = []
    """The turn cannot go on without the answers: the workflow asks, then plans the same turn again with `replies`."""
    withdrawn: list[str] = []
    """Tools that the turn did not offer because their service does not answer."""
