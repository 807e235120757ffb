"""Options of a model call besides messages and tools. Agents declare them; the settings hold each model's limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.contracts.data import Json
from holdfast.contracts.turn import Usage
from holdfast.setting_formats import OURS

MAX_TOKENS = 8192
"""Default limit of an answer in tokens: every request has a limit."""


@dataclass(frozen=True)
class ModelOptions:
    """Options of the model calls of an agent or of one tool: `AgentSpec(model=ModelOptions(max_tokens=2000))`."""

    max_tokens: int | None = None
    """Most tokens of an answer, reasoning included. The lower of this and `HOLDFAST_MODEL_MAX_TOKENS` applies; 8192
    when neither is set."""
    temperature: float | None = None
    """None: the one of the model's settings, else the endpoint's default."""
    schema: Json | None = None
    """JSON schema of the answer, for a tool that asks for JSON; sent as `response_format`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further request parameters, under the endpoint's names: `{"reasoning_effort": "low"}`."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise TypeError(f"ModelOptions(max_tokens={self.max_tokens}): expected at least 1")
        if clash := OURS & {*self.extra}:
            raise TypeError(f"ModelOptions: Holdfast sets {', '.join(sorted(clash))} itself; remove it from `extra`")


AS_SET = ModelOptions()
"""No options of its own: the settings apply."""


@dataclass(frozen=True)
class ModelAnswer:
    """A complete answer of a model."""

    message: Json
    """The assistant message as the endpoint accepts it back: role, content or tool_calls (or both), no None fields.

    A message that was cut at its token limit has the key `conversation.CUT`, which is not sent.
    """
    model: str
    """The model's name, as the endpoint gives it."""
    usage: Usage
    finish_reason: str
    """`stop`, `tool_calls` or `length` (cut off)."""
    simulated: bool = False
    origin: str = ""
    """Why another model than the first one answered; empty when the first one did."""

    @property
    def label(self) -> str:
        """The model's name for people; it says when the model is simulated."""
        return f"{self.model} (simulated)" if self.simulated else self.model

    @property
    def text(self) -> str:
        """The answer's text: its content, or the refusal."""
        return self.message.get("content") or self.message.get("refusal") or ""

    def to_json(self) -> Json:
        return {
            "message": self.message,
            "model": self.model,
            "usage": self.usage.model_dump(mode="json"),
            "finish_reason": self.finish_reason,
            "simulated": self.simulated,
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, value: Json) -> ModelAnswer:
        return cls(**{**value, "usage": Usage.model_validate(value["usage"])})
