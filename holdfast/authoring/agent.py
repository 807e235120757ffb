"""The declaration of an agent: data, tools and prompts. One workflow, `AgentWorkflow`, runs every agent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel

from holdfast.authoring.options import AS_SET, ModelOptions
from holdfast.authoring.services import BreakerRule, Service
from holdfast.authoring.tools import Tool
from holdfast.contracts.data import Json
from holdfast.contracts.profile import Effect, Profile, StepSpec
from holdfast.contracts.wording import did_you_mean

if TYPE_CHECKING:
    from langgraph.graph import StateGraph

MOST_CALLS = 300
"""Upper bound of `max_calls` and `parallel_calls`: one workflow task (0.2 s) can take this many answers of people."""


def _as_json(value: BaseModel) -> str:
    return json.dumps(value.model_dump(mode="json"), ensure_ascii=False)


class ToolServer(Protocol):
    """A source of further tools for an agent: an MCP server (`holdfast.ext.mcp`)."""

    @property
    def name(self) -> str: ...

    @property
    def where(self) -> object:
        """Identifies the connection: two declarations with an equal value share one."""

    @property
    def prefix(self) -> str:
        """The prefix of its tools' names."""
        ...

    def lacks(self, there: Container[str]) -> list[str]:
        """The tools that the declaration names and `there` lacks, by the server's own names."""
        ...

    def may_have(self, name: str) -> bool:
        """Whether this could be the name of one of the server's tools."""
        ...

    def tool(self, name: str, version: str) -> Tool:
        """Returns the tool by the name that the model uses, in the version that the model chose."""
        ...


@dataclass(frozen=True)
class AgentSpec:
    """Declares an agent. `holdfast.authoring.registry` finds every `SPEC` in `agents/*/spec.py`."""

    name: str
    description: str
    instructions: str
    """The system prompt."""
    input: type[BaseModel]
    """The input of a run, validated before the run starts."""
    tools: tuple[Tool, ...]
    steps: tuple[StepSpec, ...] = ()
    version: str = "1"
    prompt: Callable[[Any], str] = _as_json
    """Turns the validated input into the first user message."""
    model: ModelOptions = AS_SET
    """Options of the agent's model calls: token limit of an answer, temperature, further parameters."""
    max_turns: int = 40
    deadline: timedelta = timedelta(days=1)
    turns_per_execution: int = 100
    max_calls: int = 32
    """The limit of tool calls in one turn. A model that makes more reads this number and chooses again."""
    parallel_calls: int = 8
    """Tool calls of a turn that run at the same time; the others wait for a slot. A call that waits for a person or for
    its service takes no slot."""
    services: tuple[Service, ...] = ()
    """Rate limits and circuit breakers of the services that its tools use, where the defaults do not fit."""
    graph: StateGraph[Any, Any, Any, Any] | str | None = None
    """The agent's own graph, not compiled; see `holdfast.reasoning.graph`. None: a model decides in a loop.

    Only workers import a graph given as "package.module:name": importing LangGraph costs a second of CPU, which
    commands then save.
    """
    mcp: tuple[ToolServer, ...] = ()
    """MCP servers whose tools the agent has as well. Each turn asks the servers for their tools."""
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
        _check_servers(self.name, self.mcp, [each.name for each in self.tools if not each.remote])
        for step in self.steps:
            if unknown := [name for name in step.tools if self.tool(name) is None]:
                meant = did_you_mean(unknown[0], self.by_name)
                raise TypeError(f"agent {self.name}: step {step.name} names unknown tools {unknown}{meant}")
        if isinstance(self.graph, str) and not re.fullmatch(r"[\w.]+:\w+", self.graph):
            raise TypeError(f"agent {self.name}: its graph is named {self.graph!r}, not like package.module:name")

    def tool(self, name: str, version: str = "1") -> Tool | None:
        """Returns the tool of that name, or None. `version`, of an MCP server's tool: the one that the model chose."""
        declared = (server.tool(name, version) for server in self.mcp if server.may_have(name))
        return self.by_name.get(name) or next(declared, None)

    @property
    def profile(self) -> Profile:
        """The spec as data, which a run carries."""
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
        """Returns the first messages of a run. Raises pydantic's ValidationError when the input does not fit."""
        prompt = self.prompt(self.input.model_validate(value))
        return [{"role": "system", "content": self.instructions}, {"role": "user", "content": prompt}]


def _check_servers(agent: str, servers: tuple[ToolServer, ...], tools: list[str]) -> None:
    """Raises TypeError unless the prefix of a tool's name identifies its server."""
    for server in servers:
        if clash := [name for name in tools if name.startswith(server.prefix)]:
            raise TypeError(f"agent {agent}: tool {clash[0]} has the prefix of MCP server {server.name}")
        for other in servers:
            if other is not server and other.prefix.startswith(server.prefix):
                raise TypeError(f"agent {agent}: MCP servers {server.name} and {other.name}: one name begins the other")


__all__ = ["AgentSpec", "BreakerRule", "Effect", "ModelOptions", "Service", "StepSpec"]
