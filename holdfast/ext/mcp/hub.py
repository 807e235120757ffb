"""The MCP servers of a process: one connection to each, opened at first use."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import httpx2

from holdfast.authoring.agent import AgentSpec
from holdfast.ext.mcp.failures import ServerDown
from holdfast.ext.mcp.spec import McpServer, RemoteTool

if TYPE_CHECKING:
    from holdfast.ext.mcp.connection import Connection

BIND_S = 20.0
"""Seconds that a turn waits for a server that must be started first."""


class Hub:
    """Holds the connections. `connection` may be called for every tool call: it opens nothing before a request."""

    def __init__(self) -> None:
        self._connections: dict[object, Connection] = {}

    def connection(self, server: McpServer) -> Connection:
        from holdfast.ext.mcp.connection import Connection  # the import takes most of a second; few processes need it

        if server.where not in self._connections:
            self._connections[server.where] = Connection(server)
        return self._connections[server.where]

    async def bind(self, spec: AgentSpec, connect_s: float = BIND_S) -> tuple[AgentSpec, dict[str, str]]:
        """Returns the agent with its servers' current tools, and by server the reason why it could not be asked."""
        if not spec.mcp:
            return spec, {}
        servers = [each for each in spec.mcp if isinstance(each, McpServer)]
        answers = await asyncio.gather(*(self._tools(server, connect_s) for server in servers))
        found = zip(servers, answers, strict=True)
        down = {server.name: answer for server, answer in found if isinstance(answer, str)}
        tools = [tool for answer in answers if not isinstance(answer, str) for tool in answer]
        return replace(spec, tools=(*spec.tools, *tools)), down

    async def _tools(self, server: McpServer, connect_s: float) -> tuple[RemoteTool, ...] | str:
        try:
            return server.tools(await self.connection(server).tools(connect_s))
        except ServerDown as down:
            return str(down)
        except httpx2.HTTPStatusError as error:
            return f"MCP server {server.name} answered {error.response.status_code}"

    async def close(self) -> None:
        await asyncio.gather(*(each.close() for each in self._connections.values()))
