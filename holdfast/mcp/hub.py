"""The MCP servers of a process: one connection each, opened at first use."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import httpx2

from holdfast.agent import AgentSpec
from holdfast.mcp.failures import ServerDown
from holdfast.mcp.spec import McpServer
from holdfast.mcp.tool import RemoteTool, remote_tools

if TYPE_CHECKING:
    from holdfast.mcp.connection import Connection

BIND_S = 20.0
"""How long a turn waits for a server that has to be started first."""


class Hub:
    """`connection` is safe to call for every call; nothing is opened before something is asked."""

    def __init__(self) -> None:
        self._connections: dict[object, Connection] = {}

    def connection(self, server: McpServer) -> Connection:
        from holdfast.mcp.connection import Connection  # takes most of a second, and most processes need it never

        if server.where not in self._connections:
            self._connections[server.where] = Connection(server)
        return self._connections[server.where]

    async def bind(self, spec: AgentSpec, connect_s: float = BIND_S) -> tuple[AgentSpec, dict[str, str]]:
        """The agent with the tools that its servers have now; by server, why it could not be asked."""
        if not spec.mcp:
            return spec, {}
        answers = await asyncio.gather(*(self._tools(server, connect_s) for server in spec.mcp))
        found = zip(spec.mcp, answers, strict=True)
        down = {server.name: answer for server, answer in found if isinstance(answer, str)}
        tools = [tool for answer in answers if not isinstance(answer, str) for tool in answer]
        return replace(spec, tools=(*spec.tools, *tools)), down

    async def _tools(self, server: McpServer, connect_s: float) -> tuple[RemoteTool, ...] | str:
        try:
            return remote_tools(server, await self.connection(server).tools(connect_s))
        except ServerDown as down:
            return str(down)
        except httpx2.HTTPStatusError as error:
            return f"MCP server {server.name} answered {error.response.status_code}"

    async def close(self) -> None:
        await asyncio.gather(*(each.close() for each in self._connections.values()))
