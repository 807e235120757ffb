"""What an agent is: data, tools and words. One `AgentWorkflow` runs them all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from holdfast.contracts import Effect, Json, Profile, StepSpec
from holdfast.mcp.spec import McpServer, McpTool, check_servers
from holdfast.mcp.tool import RemoteTool, remote_tool
from holdfast.options import AS_SET, ModelOptions
from holdfast.services import BreakerRule, Service
from holdfast.tools import Tool
from holdfast.wording import did_you_mean

if TYPE_CHECKING:
    from langgraph.graph import StateGraph

MOST_CALLS = 300
"""What `max_calls` and `parallel_calls` may be set to: so many answers of people fit into one workflow task (0.2 s)."""


def _as_json(value: BaseModel) -> str:
    return json.dumps(value.model_dump(mode="json"), ensure_ascii=False)


@dataclass(frozen=True)
class AgentSpec:
    """An agent. `agents.registry` finds every `SPEC` in `agents/*/spec.py`."""

    name: str
    description: str
    instructions: str
    """The system prompt."""
    input: type[BaseModel]
    """What a run is started with; checked at the door."""
    tools: tuple[Tool, ...]
    steps: tuple[StepSpec, ...] = ()
    version: str = "1"
    prompt: Callable[[Any], str] = _as_json
    """Turns the validated input into the first user message."""
    model: ModelOptions = AS_SET
    """How its model is asked: the limit of an answer, temperature, further parameters."""
    max_turns: int = 40
    deadline: timedelta = timedelta(days=1)
    turns_per_execution: int = 100
    max_calls: int = 32
    """Tool calls of one turn. A model that makes more reads this number and chooses again."""
    parallel_calls: int = 8
    """Tool calls that are at work at a time; the others of the turn wait for a place. A call that waits for a person or
    for its service has none."""
    services: tuple[Service, ...] = ()
    """Limits and breakers of the services that its tools use, where the defaults do not fit."""
    graph: StateGraph[Any, Any, Any, Any] | str | None = None
    """A graph of one's own, not compiled; see `holdfast.graph`. Without one a model decides in a loop.

    As "package.module:name" it is imported by workers alone: LangGraph would cost each command a second of CPU.
    """
    mcp: tuple[McpServer, ...] = ()
    """Servers whose tools the agent has as well. Which those are is known once they are asked (`holdfast.mcp.hub`)."""
    by_name: dict[str, Tool] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_calls", "parallel_calls"):
            wanted = getattr(self, name)
            if not isinstance(wanted, int) or not 1 <= wanted <= MOST_CALLS:
                raise TypeError(f"agent {self.name}: {name} has to be a number from 1 to {MOST_CALLS}, not {wanted!r}")
        for each in self.tools:
            each.check()
            if each.name in self.by_name:
                raise TypeError(f"agent {self.name}: two tools are named {each.name}")
            self.by_name[each.name] = each
        check_servers(self.name, self.mcp, [each.name for each in self.tools if not isinstance(each, RemoteTool)])
        for step in self.steps:
            if unknown := [name for name in step.tools if self.tool(name) is None]:
                meant = did_you_mean(unknown[0], self.by_name)
                raise TypeError(f"agent {self.name}: step {step.name} names unknown tools {unknown}{meant}")
        if isinstance(self.graph, str):
            if not re.fullmatch(r"[\w.]+:\w+", self.graph):
                raise TypeError(f"agent {self.name}: its graph is named {self.graph!r}, not like package.module:name")
        elif self.graph is not None:
            from holdfast.turns import check  # it needs this module

            check(self.graph, self.name)

    def tool(self, name: str, version: str = "1") -> Tool | None:
        """The tool of that name; one of an MCP server in the version that a call was decided for."""
        declared = (remote_tool(server, name, version) for server in self.mcp if server.may_have(name))
        return self.by_name.get(name) or next(declared, None)

    @property
    def profile(self) -> Profile:
        """The spec as the data that a run carries."""
        return Profile(
            agent=self.name,
            version=self.version,
            tools={tool.name: tool.policy for tool in self.tools},
            steps=list(self.steps),
            max_turns=self.max_turns,
            deadline_s=self.deadline.total_seconds(),
            turns_per_execution=self.turns_per_execution,
            parallel_calls=self.parallel_calls,
        )

    def messages(self, value: Json) -> list[Json]:
        """The first messages of a run. Raises pydantic's ValidationError for an input that does not fit."""
        prompt = self.prompt(self.input.model_validate(value))
        return [{"role": "system", "content": self.instructions}, {"role": "user", "content": prompt}]


__all__ = ["AgentSpec", "BreakerRule", "Effect", "McpServer", "McpTool", "ModelOptions", "Service", "StepSpec"]
