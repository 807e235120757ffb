"""What a run asks people, and what they answer."""

from __future__ import annotations

import json
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from holdfast.contracts.data import Json

MAX_SAID = 100_000
"""Most bytes of JSON that a person may send as arguments or as an answer: the run carries them to its end."""


class Verdict(StrEnum):
    APPROVE = "approve"
    REJECT = "reject"
    EDIT = "edit"
    """The call may run, with the decision's arguments instead."""
    ANSWER = "answer"
    """For a question: the answer to it."""
    HAPPENED = "happened"
    """For an unknown or undone call: it happened, or a person did it (with this result)."""
    DID_NOT = "did_not"
    """It did not happen; the agent may do it again."""


class Approval(BaseModel):
    """A request to a person. It is bound to `digest` of the arguments and can be used once.

    kind `tool`: blocks one call; answered by approve, edit or reject. `outcome`: asks how a call ended that the
    platform cannot settle; blocks only the end of a critical step; answered by happened or did_not. `refusal`: the
    model refuses the turn by its policy; approve asks it again, reject ends the run. `question`: the agent asks;
    answered by answer.
    """

    id: str
    kind: Literal["tool", "outcome", "refusal", "question"] = "tool"
    subject: str
    """The tool that is to run, or ran; for a question, its beginning."""
    seq: int
    arguments: Json = {}
    digest: str = ""
    why: str = ""
    evidence: str = ""
    """What the run has done so far, in one line."""
    cost_usd: float = 0.0
    asked_at: datetime
    role: str = ""
    """The role that is asked; empty: every person who may decide."""
    key: str = ""
    """Idempotency key of the call in question."""
    step: str = ""
    eta: datetime | None = None
    """When the role will probably have answered."""
    about: str = ""
    """For kind `outcome`: the call's status that the question shows. The answer applies to this status only."""


class ApprovalDecision(BaseModel):
    """Payload of the Signal and the Update `decide`: plain JSON, which a person can type."""

    approval_id: str
    verdict: Verdict
    approver: str = Field(min_length=1, max_length=200)
    comment: str = Field(default="", max_length=4000)
    digest: str = ""
    """If given, it must match the approval's digest, which binds the decision to these arguments."""
    result: Any = None
    """With `happened`: the result that the call would have returned, as JSON."""
    arguments: Json | None = None
    """With `edit`: all arguments of the call, in place of the requested ones."""
    answer: Any = None
    """With `answer`: a text, or other JSON."""

    @field_validator("arguments", "answer")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        if (size := len(json.dumps(value, ensure_ascii=False).encode())) > MAX_SAID:
            raise ValueError(f"{size} bytes; at most {MAX_SAID}")
        return value


class Message(BaseModel):
    """Payload of the Signal and the Update `message`: a person's message to a run, as plain JSON."""

    text: str = Field(min_length=1, max_length=10_000)
    by: str = Field(min_length=1, max_length=200)


class Finding(BaseModel):
    """What a person found out about a call whose outcome is unknown. Input of the activity `settle`."""

    key: str
    happened: bool
    result: Any = None
    by: str
    comment: str = ""


class DecisionReply(BaseModel):
    """Result of the Updates `decide` and `message`; the Signals record the same in the run's status."""

    accepted: bool
    message: str


class DecidedApproval(BaseModel):
    approval: Approval
    decision: ApprovalDecision
    decided_at: datetime
