"""What a request to a model says besides its messages and tools. Declared by agents; the settings say what each model
bears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.contracts import Json

OURS = frozenset(
    {
        "model",
        "messages",
        "tools",
        "tool_choice",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "n",
    }
)
"""Parameters that Holdfast sets itself."""
MAX_TOKENS = 8192
"""Tokens of an answer where no setting gives a number: no request goes out without a limit."""


@dataclass(frozen=True)
class ModelOptions:
    """How an agent, or a tool of it, wants its model asked: `AgentSpec(model=ModelOptions(max_tokens=2000))`."""

    max_tokens: int | None = None
    """Tokens of an answer, thoughts included; none: 8192. The lower of this and `HOLDFAST_MODEL_MAX_TOKENS`."""
    temperature: float | None = None
    """None: that of the model's settings, else the endpoint's own."""
    schema: Json | None = None
    """JSON schema of the answer, for a tool that asks for JSON: sent as `response_format`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further parameters of the request, as the endpoint names them: `{"reasoning_effort": "low"}`."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise TypeError(f"ModelOptions(max_tokens={self.max_tokens}): expected at least 1")
        if clash := OURS & {*self.extra}:
            raise TypeError(f"ModelOptions: Holdfast sets {', '.join(sorted(clash))} itself; remove it from `extra`")


AS_SET = ModelOptions()
"""As the settings have it."""
