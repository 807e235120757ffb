"""One session with an MCP server, from the handshake to its end, and its transports."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from mcp import Client, MCPError, StdioServerParameters, stdio_client, types
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost

from holdfast.ext.mcp import transport
from holdfast.ext.mcp.failures import ServerDown
from holdfast.ext.mcp.listing import Listed, listed
from holdfast.ext.mcp.spec import McpServer

log = logging.getLogger(__name__)

CHECK_S = 5.0
"""Seconds for a server that did not answer a call in time to list its tools; otherwise its session is closed and its
process killed."""
AGAIN_S = 2.0
"""Seconds before a broken stream of changes is opened again."""
_SUPERVISOR = Path(__file__).with_name("supervisor.py")


class Session:
    """A session, open until `ended` is set."""

    def __init__(self, server: McpServer) -> None:
        self.server = server
        self.ended = asyncio.Event()
        self.check: asyncio.Task[None] | None = None
        self.client: Client = None  # pyright: ignore[reportAttributeAccessIssue]  # set by `open`, before any use
        self._listing: dict[str, Listed] = {}
        self._stale = True
        self._lock = asyncio.Lock()

    async def open(self, stack: AsyncExitStack) -> None:
        transport = _noting_the_end(await _transport(self.server, stack), self.ended)
        self.client = await stack.enter_async_context(Client(transport, message_handler=self._hear, cache=None))
        await self.tools()

    async def tools(self) -> dict[str, Listed]:
        """Returns the server's tools by the names that the model uses. Lists them again after the server reported a
        change."""
        async with self._lock:
            if self._stale:
                self._stale = False
                try:
                    self._listing = await _list(self.client, self.server)
                except BaseException:
                    self._stale = True
                    raise
            return self._listing

    async def _hear(self, message: types.ServerNotification | Exception) -> None:
        if isinstance(message, types.ToolListChangedNotification):
            self._stale = True

    async def follow_changes(self) -> None:
        """Listens for changes of the tool list. Older protocol versions have no stream for it and send notifications
        unasked."""
        while True:
            try:
                async with self.client.listen(tools_list_changed=True) as changes:
                    self._stale = True  # the stream does not report changes from before it was opened
                    async for _ in changes:
                        self._stale = True
                return
            except ListenNotSupportedError:
                return
            except (MCPError, SubscriptionLost):
                self._stale = True
                await asyncio.sleep(AGAIN_S)

    def doubt(self) -> None:
        """Checks whether the server still answers, after a call got no answer in time."""
        if self.check is None or self.check.done():
            self.check = asyncio.create_task(self._check())

    async def _check(self) -> None:
        try:
            async with asyncio.timeout(CHECK_S):
                await self.client.list_tools()
        except (TimeoutError, MCPError, RuntimeError):
            log.warning("MCP server %s does not answer: closing its session", self.server.name)
            self.ended.set()


async def _list(client: Client, server: McpServer) -> dict[str, Listed]:
    """Returns all usable tools by the names that the model uses."""
    found: dict[str, Listed] = {}
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        for each in map(listed, page.tools):
            name = server.tool_name(each.remote)
            if each.problem or name in found:
                why = each.problem or "another tool has the same name"
                log.warning("MCP server %s: leaving out tool %s: %s", server.name, each.remote, why)
            else:
                found[name] = each
        cursor = page.next_cursor
        if not cursor:
            return found


# ------------------------------------------------------------------ transports


async def _transport(server: McpServer, stack: AsyncExitStack) -> Any:
    if server.url:
        headers = {name: _variable(server, variable) for name, variable in server.headers_env.items()}
        # Only connecting has a timeout here: the reliability chain applies the tool's timeout to each call.
        timeout = httpx2.Timeout(None, connect=5.0)
        http = await stack.enter_async_context(
            httpx2.AsyncClient(transport=transport.Wire(), headers=headers, timeout=timeout)
        )
        return streamable_http_client(server.url, http_client=http)
    supervisor = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(os.getpid())]
    environment = {name: _variable(server, name) for name in server.env}
    parameters = StdioServerParameters(command=supervisor[0], args=[*supervisor[1:], *server.command], env=environment)
    return stdio_client(parameters, errlog=sys.__stderr__ or sys.stderr)


def _variable(server: McpServer, name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise ServerDown(f"MCP server {server.name} needs the environment variable {name}, which is not set")
    return value


@asynccontextmanager
async def _noting_the_end(transport: Any, ended: asyncio.Event) -> AsyncIterator[tuple[Any, Any]]:
    """Wraps the transport and sets `ended` when its input ends, so that the next call opens a new session."""
    async with transport as (read, write):
        yield _Reader(read, ended), write


class _Reader:
    def __init__(self, stream: Any, ended: asyncio.Event) -> None:
        self._stream = stream
        self._ended = ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def __aenter__(self) -> _Reader:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stream.__aexit__(*error)

    def __aiter__(self) -> _Reader:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._stream.__anext__()
        except BaseException:
            self._ended.set()
            raise
