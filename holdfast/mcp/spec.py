"""MCP servers as an agent names them: where they are, and how carefully each of their tools is called.

    McpServer("time", command=("mcp-server-time",), effects={"get_current_time": Effect.READ})
    McpServer("crm", url="https://crm.example/mcp", headers_env={"Authorization": "CRM_TOKEN"},
              effects={"find": Effect.READ, "close_deal": McpTool(Effect.MANUAL, approval=True, timeout=30)})

What a server says of its own tools (`readOnlyHint` and the like) decides nothing: who trusts it, says so here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from holdfast.contracts import Effect, digest

LONGEST_NAME = 64
"""What OpenAI's endpoints take as the name of a tool, of these characters."""
_ODD = re.compile(r"[^a-zA-Z0-9_-]")
_SERVER = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,23}")


@dataclass(frozen=True)
class McpTool:
    """How the platform calls one tool of an MCP server. Units as in `@tool`: seconds; failures after the first try."""

    effect: Effect
    approval: bool = False
    role: str = ""
    """Who is asked for the approval; empty: the role of the tool's step."""
    timeout: float = 10.0
    retries: int = 5

    def __post_init__(self) -> None:
        if self.effect is Effect.PROBE:
            raise TypeError("an MCP tool cannot be of effect class `probe`: MCP has no way to ask what a key did")


UNSEEN = "1"
"""Version of a tool that was called by name, by code of a graph, while its server did not answer."""
UNNAMED = McpTool(Effect.MANUAL, approval=True)
"""A tool that the spec says nothing of: it runs once at most, and only after a person's yes."""


@dataclass(frozen=True)
class McpServer:
    """A server whose tools an agent has, as `<name>_<tool>`. `name` is also the service of its breaker and limits.

    Exactly one of `command` (a process of each worker's own, over stdio) and `url` (streamable HTTP).
    Raises TypeError at import for a declaration that could not work.
    """

    name: str
    command: tuple[str, ...] = ()
    url: str = ""
    env: tuple[str, ...] = ()
    """Variables of the worker's environment that the process gets, besides PATH, HOME and the like."""
    headers_env: Mapping[str, str] = field(default_factory=dict, hash=False)
    """HTTP headers and the environment variables that hold their whole values."""
    effects: Mapping[str, Effect | McpTool] = field(default_factory=dict, hash=False)
    """By the server's own names. A tool that is not here is `UNNAMED`."""
    only: tuple[str, ...] = ()
    """The tools that the agent has; empty: all."""

    def __post_init__(self) -> None:
        for label in ("command", "env", "only"):
            if isinstance(getattr(self, label), str):
                raise TypeError(f"MCP server {self.name}: {label} is a tuple of words, not a text")
        if not _SERVER.fullmatch(self.name):
            raise TypeError(f"MCP server {self.name!r}: a name is up to 24 letters, digits, _ and -")
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
        """What makes a connection: two declarations that agree in it share one."""
        return (self.name, self.command, self.url, self.env, tuple(sorted(self.headers_env.items())))

    @property
    def prefix(self) -> str:
        return f"{self.name}_"

    def tool_name(self, remote: str) -> str:
        """The name by which the model calls the server's tool; a name that does not fit is cut and made unique."""
        plain = self.prefix + remote
        if len(plain) <= LONGEST_NAME and not _ODD.search(plain):
            return plain
        return f"{_ODD.sub('_', plain)[: LONGEST_NAME - 7]}_{digest(remote)[:6]}"

    def rule(self, name: str) -> McpTool:
        """How the tool that the model calls by this name is called."""
        for remote, told in self.effects.items():
            if self.tool_name(remote) == name:
                return told if isinstance(told, McpTool) else McpTool(Effect(told))
        return UNNAMED

    def may_have(self, name: str) -> bool:
        """Whether a tool of this name could be the server's, as far as the spec knows."""
        return name.startswith(self.prefix) and (not self.only or name in map(self.tool_name, self.only))


def check_servers(agent: str, servers: tuple[McpServer, ...], tools: list[str]) -> None:
    """Raises TypeError unless a tool's name says whose it is."""
    for server in servers:
        if clash := [name for name in tools if name.startswith(server.prefix)]:
            raise TypeError(f"agent {agent}: tool {clash[0]} has the prefix of MCP server {server.name}")
        for other in servers:
            if other is not server and other.prefix.startswith(server.prefix):
                raise TypeError(f"agent {agent}: MCP servers {server.name} and {other.name}: one name begins the other")
