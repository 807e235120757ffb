"""One session with an MCP server, from its handshake to its end, and the transports below it."""

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

from holdfast.mcp import wire
from holdfast.mcp.failures import ServerDown
from holdfast.mcp.listing import Listed, listed
from holdfast.mcp.spec import McpServer

log = logging.getLogger(__name__)

CHECK_S = 5.0
"""For a server that did not answer a call in time to list its tools; then it is given up, and its process killed."""
AGAIN_S = 2.0
"""Until a stream of changes that broke off is opened again."""
_MINDER = Path(__file__).with_name("minder.py")


class Session:
    """A session that is open, as long as `ended` is not set."""

    def __init__(self, server: McpServer) -> None:
        self.server = server
        self.ended = asyncio.Event()
        self.check: asyncio.Task[None] | None = None
        self.client: Client = None  # pyright: ignore[reportAttributeAccessIssue]  # set by `open`, before anyone has it
        self._listing: dict[str, Listed] = {}
        self._stale = True
        self._lock = asyncio.Lock()

    async def open(self, stack: AsyncExitStack) -> None:
        transport = _noting_the_end(await _transport(self.server, stack), self.ended)
        self.client = await stack.enter_async_context(Client(transport, message_handler=self._hear, cache=None))
        await self.tools()

    async def tools(self) -> dict[str, Listed]:
        """What the server offers, by the names that the model uses; asked again once it said that it changed."""
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
        """Hears of a changed list where the protocol has a stream for it; before, notifications came unasked."""
        while True:
            try:
                async with self.client.listen(tools_list_changed=True) as changes:
                    self._stale = True  # what changed before the stream was open has not been told
                    async for _ in changes:
                        self._stale = True
                return
            except ListenNotSupportedError:
                return
            except (MCPError, SubscriptionLost):
                self._stale = True
                await asyncio.sleep(AGAIN_S)

    def doubt(self) -> None:
        """A call got no answer in time: looks whether the server answers anything at all."""
        if self.check is None or self.check.done():
            self.check = asyncio.create_task(self._check())

    async def _check(self) -> None:
        try:
            async with asyncio.timeout(CHECK_S):
                await self.client.list_tools()
        except (TimeoutError, MCPError, RuntimeError):
            log.warning("MCP server %s does not answer: its session is closed", self.server.name)
            self.ended.set()


async def _list(client: Client, server: McpServer) -> dict[str, Listed]:
    """All tools that can be used, by the names that the model uses."""
    found: dict[str, Listed] = {}
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        for each in map(listed, page.tools):
            name = server.tool_name(each.remote)
            if each.problem or name in found:
                why = each.problem or "its name is taken"
                log.warning("MCP server %s: tool %s is left out: %s", server.name, each.remote, why)
            else:
                found[name] = each
        cursor = page.next_cursor
        if not cursor:
            return found


# ------------------------------------------------------------------ transports


async def _transport(server: McpServer, stack: AsyncExitStack) -> Any:
    if server.url:
        headers = {name: _variable(server, variable) for name, variable in server.headers_env.items()}
        # No timeout of its own: the chain puts the tool's own around each call. Connecting is another matter.
        timeout = httpx2.Timeout(None, connect=5.0)
        http = await stack.enter_async_context(
            httpx2.AsyncClient(transport=wire.Wire(), headers=headers, timeout=timeout)
        )
        return streamable_http_client(server.url, http_client=http)
    minder = [sys.executable, "-I", "-S", str(_MINDER), str(os.getpid())]
    environment = {name: _variable(server, name) for name in server.env}
    parameters = StdioServerParameters(command=minder[0], args=[*minder[1:], *server.command], env=environment)
    return stdio_client(parameters, errlog=sys.__stderr__ or sys.stderr)


def _variable(server: McpServer, name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise ServerDown(f"MCP server {server.name} needs the environment variable {name}, which is not set")
    return value


@asynccontextmanager
async def _noting_the_end(transport: Any, ended: asyncio.Event) -> AsyncIterator[tuple[Any, Any]]:
    """The transport, with `ended` set as soon as nothing more can come: the next call opens a session of its own."""
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
