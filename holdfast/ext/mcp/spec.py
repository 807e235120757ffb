"""Declares an agent's MCP servers: where they are, and the effect class and limits of each of their tools.

    McpServer("time", command=("mcp-server-time",), effects={"get_current_time": Effect.READ})
    McpServer("crm", url="https://crm.example/mcp", headers_env={"Authorization": "CRM_TOKEN"},
              effects={"find": Effect.READ, "close_deal": McpTool(Effect.MANUAL, approval=True, timeout=30)})

A server's own hints about its tools (`readOnlyHint` and the like) have no effect: an author who trusts them declares
the effects here.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from holdfast.authoring.tools import Tool, ToolContext
from holdfast.contracts.data import Json, digest
from holdfast.contracts.profile import Effect

if TYPE_CHECKING:
    from holdfast.ext.mcp.listing import Listed

LONGEST_NAME = 64
"""Longest tool name that OpenAI's endpoints accept; the allowed characters are those that `_ODD` does not match."""
_ODD = re.compile(r"[^a-zA-Z0-9_-]")
_SERVER = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,23}")


@dataclass(frozen=True)
class McpTool:
    """How the platform calls one tool of an MCP server. Units as in `@tool`: seconds; failures after the first one."""

    effect: Effect
    approval: bool = False
    role: str = ""
    """Who is asked to approve; empty: the role of the tool's step."""
    timeout: float = 10.0
    retries: int = 5

    def __post_init__(self) -> None:
        if self.effect is Effect.PROBE:
            raise TypeError("an MCP tool cannot be of effect class `probe`: MCP has no way to ask what a key did")


UNSEEN = "1"
"""Version of a tool that a graph's code called by name while its server did not answer."""
UNNAMED = McpTool(Effect.MANUAL, approval=True)
"""Rule of a tool that the spec does not declare: it runs at most once, and only after a person's approval."""


@dataclass(frozen=True)
class McpServer:
    """Declares a server whose tools an agent has, as `<name>_<tool>`. `name` is also the service of its circuit breaker
    and rate limits.

    Exactly one of `command` (each worker starts its own process, over stdio) and `url` (streamable HTTP) is set.
    Raises TypeError at import for a declaration that could not work.
    """

    name: str
    command: tuple[str, ...] = ()
    url: str = ""
    env: tuple[str, ...] = ()
    """Environment variables of the worker that the process gets, besides PATH, HOME and the like."""
    headers_env: Mapping[str, str] = field(default_factory=dict, hash=False)
    """HTTP headers, each with the environment variable that holds its whole value."""
    effects: Mapping[str, Effect | McpTool] = field(default_factory=dict, hash=False)
    """Rules by the server's own tool names. A tool that is not here is `UNNAMED`."""
    only: tuple[str, ...] = ()
    """The tools that the agent has, by the server's own names; empty: all."""

    def __post_init__(self) -> None:
        for label in ("command", "env", "only"):
            if isinstance(getattr(self, label), str):
                raise TypeError(f"MCP server {self.name}: {label} has to be a tuple of words, not one string")
        if not _SERVER.fullmatch(self.name):
            raise TypeError(f"MCP server {self.name!r}: a name has up to 24 letters, digits, _ and -")
        if bool(self.command) == bool(self.url):
            raise TypeError(f"MCP server {self.name}: needs either a command or a url")
        where = urlsplit(self.url)
        if self.url and (where.scheme not in ("http", "https") or not where.hostname):
            raise TypeError(f"MCP server {self.name}: the url has to begin with http:// or https://")
        if where.username or where.password:
            raise TypeError(f"MCP server {self.name}: no credentials in the url; name their variable in headers_env")
        if (self.headers_env and not self.url) or (self.env and not self.command):
            raise TypeError(f"MCP server {self.name}: headers_env goes with a url, env with a command")
        if self.only and (lost := sorted(set(self.effects) - set(self.only))):
            raise TypeError(f"MCP server {self.name}: effects names {', '.join(lost)}, which `only` leaves out")
        for each in self.effects.values():
            if not isinstance(each, McpTool):
                McpTool(Effect(each))

    @property
    def where(self) -> tuple[object, ...]:
        """Identifies the connection: two declarations with an equal value share one."""
        return (self.name, self.command, self.url, self.env, tuple(sorted(self.headers_env.items())))

    @property
    def prefix(self) -> str:
        return f"{self.name}_"

    def tool_name(self, remote: str) -> str:
        """Returns the model's name for the server's tool. A name that does not fit is cut and made unique."""
        plain = self.prefix + remote
        if len(plain) <= LONGEST_NAME and not _ODD.search(plain):
            return plain
        return f"{_ODD.sub('_', plain)[: LONGEST_NAME - 7]}_{digest(remote)[:6]}"

    def rule(self, name: str) -> McpTool:
        """Returns the rule for the tool with this name (the model's)."""
        for remote, told in self.effects.items():
            if self.tool_name(remote) == name:
                return told if isinstance(told, McpTool) else McpTool(Effect(told))
        return UNNAMED

    def tool(self, name: str, version: str = UNSEEN, listed: Listed | None = None) -> RemoteTool:
        """Returns the tool by the name that the model uses, in the version that the decision was made for."""
        rule = self.rule(name)
        return RemoteTool(
            name=name,
            description=listed.description if listed else "",
            version=listed.version if listed else version,
            effect=rule.effect,
            service=self.name,
            timeout_s=rule.timeout,
            deadline_s=3600.0,
            retries=rule.retries,
            approval=rule.approval,
            role=rule.role,
            function=_no_function,
            arguments=Anything,
            result_schema=listed.result_schema if listed else {},
            remote=True,
            server=self,
            listed=listed,
        )

    def tools(self, listing: Mapping[str, Listed]) -> tuple[RemoteTool, ...]:
        """Returns the tools of a listing that the agent has."""
        return tuple(self.tool(name, listed=listed) for name, listed in listing.items() if self.may_have(name))

    def lacks(self, there: Container[str]) -> list[str]:
        """Returns the tools that the declaration names and `there` lacks, by the server's own names."""
        return sorted(name for name in {*self.effects, *self.only} if self.tool_name(name) not in there)

    def may_have(self, name: str) -> bool:
        """Whether this could be the name of one of the server's tools, as far as the spec says."""
        return name.startswith(self.prefix) and (not self.only or name in map(self.tool_name, self.only))


class Anything(BaseModel):
    """Arguments that only the server's schema describes."""

    model_config = ConfigDict(extra="allow")


@dataclass
class RemoteTool(Tool):
    """A tool of an MCP server. `listed` is None when only its name is known; the call then checks the arguments."""

    server: McpServer | None = None
    listed: Listed | None = None

    def validate(self, arguments: Any) -> Json:
        if self.listed is None:
            return Anything.model_validate(arguments).model_dump()
        return self.listed.validate(arguments)

    async def call(self, ctx: ToolContext, arguments: Json) -> Any:
        assert self.server is not None and ctx.servers is not None
        # At most half of the timeout goes to connecting. A call that fails by then was certainly not sent.
        connection = ctx.servers.connection(self.server)
        return await connection.call(self.name, self.version, arguments, ctx.key, connect_s=self.timeout_s / 2)

    @property
    def schema(self) -> Json:
        return self.listed.schema if self.listed else {"type": "object", "properties": {}}


def _no_function(*_: Any) -> None:
    raise AssertionError("a remote tool has no function of its own")
