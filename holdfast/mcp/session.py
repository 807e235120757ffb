"""One session with an MCP server: opened at first use, shared by all calls of this process, opened anew after its end.

The library wants a session opened and closed by one task, so each has an owner; calls go through it from any task.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from mcp import Client, MCPError, StdioServerParameters, stdio_client, types
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost
from pydantic import ValidationError

from holdfast.mcp import wire
from holdfast.mcp.failures import BadAnswer, ServerDown
from holdfast.mcp.listing import Listed, content, listed
from holdfast.mcp.spec import UNSEEN, McpServer
from holdfast.tools import ToolRefused, explain

log = logging.getLogger(__name__)

OPEN_S = 30.0
"""For a server to start, shake hands and list its tools."""
CHECK_S = 5.0
"""For a server that did not answer a call in time to list its tools; then it is given up, and its process killed."""
REST_S = 2.0
"""After a failed try to open a session the next one waits so long; calls meanwhile fail at once."""
CLOSE_S = 10.0
KEY_META = "holdfast/idempotency-key"
"""Under this name of `_meta` each call takes its idempotency key to the server."""
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
                    async for _ in changes:
                        self._stale = True
                return
            except ListenNotSupportedError:
                return
            except (MCPError, SubscriptionLost):
                self._stale = True
                await asyncio.sleep(REST_S)

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


class Connection:
    """The way to one server. `known` is its last listing, which outlives the session."""

    def __init__(self, server: McpServer) -> None:
        self._server = server
        self.known: Mapping[str, Listed] | None = None
        self._opening: asyncio.Future[Session] | None = None
        self._owners: set[asyncio.Task[None]] = set()
        self._failed_at = float("-inf")

    async def tools(self, connect_s: float) -> Mapping[str, Listed]:
        """What the server offers, as of now or, when it does not answer, as of its last answer.

        Raises ServerDown, or HTTPStatusError, when it has never answered this process.
        """
        try:
            session = await self._session(connect_s)
            self.known = await self._listing(session, connect_s)
        except (ServerDown, httpx2.HTTPError):
            if self.known is None:
                raise
        return self.known

    async def call(self, tool: str, version: str, arguments: Mapping[str, Any], key: str, *, connect_s: float) -> Any:
        """Calls the tool (by the model's name for it) and returns its result as JSON data.

        Raises ToolRefused when the tool is not what the decision was made for, when the arguments do not fit it or
        when it answers with an error; ServerDown when nothing was sent; BadAnswer, MCPError, httpx2's errors.
        """
        session = await self._session(connect_s)
        found = (await self._listing(session, connect_s)).get(tool)
        found = _as_decided(self._server, tool, version, arguments, found)
        heard = wire.listen()
        try:
            result = await session.client.call_tool(found.remote, dict(arguments), meta={KEY_META: key})
        except asyncio.CancelledError:
            session.doubt()
            raise
        except MCPError as error:
            raise self._meaning(error, heard, session) from None
        except RuntimeError as error:
            raise BadAnswer(self._clean(str(error))) from None
        if result.is_error:
            raise ToolRefused(self._clean(content(result)) or f"{tool} says that it failed, and not why")
        return content(result)

    async def close(self) -> None:
        """Ends the session; its process is gone afterwards."""
        opening, self._opening = self._opening, None
        if opening is not None and opening.done() and not opening.cancelled() and not opening.exception():
            opening.result().ended.set()
        elif opening is not None and not opening.done():
            for owner in self._owners:
                owner.cancel()
        if self._owners:
            await asyncio.wait(self._owners, timeout=CLOSE_S)

    # ------------------------------------------------------------ opening

    async def _session(self, wait_s: float) -> Session:
        """A session that is believed to answer. Raises ServerDown after `wait_s` seconds; the opening goes on."""
        deadline = time.monotonic() + wait_s
        opening = self._opening
        if opening is None or (opening.done() and _is_over(opening)):
            if opening and not opening.cancelled() and opening.exception() and self._rests():
                opening.result()  # raises
            opening = self._opening = asyncio.get_running_loop().create_future()
            # Read here, so that a failure that nobody waits for any more is not reported as never looked at.
            opening.add_done_callback(lambda done: done.cancelled() or done.exception())
            owner = asyncio.create_task(self._own(opening), name=f"mcp {self._server.name}")
            self._owners.add(owner)
            owner.add_done_callback(self._owners.discard)
        await asyncio.wait((opening,), timeout=wait_s)
        if not opening.done():
            raise ServerDown(f"MCP server {self._server.name} is not up after {wait_s:g} s")
        session = opening.result()
        if session.check is not None and not session.check.done():
            await asyncio.wait((session.check,), timeout=max(0.0, deadline - time.monotonic()))
            if not session.check.done() or session.ended.is_set():
                raise ServerDown(f"MCP server {self._server.name} does not answer")
        return session

    def _rests(self) -> bool:
        return time.monotonic() - self._failed_at < REST_S

    async def _own(self, opening: asyncio.Future[Session]) -> None:
        """Opens a session, holds it until its end and closes it. The failure is the opening's."""
        heard = wire.listen()
        session = Session(self._server)
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(OPEN_S):
                    await session.open(stack)
                self.known = await session.tools()
                opening.set_result(session)
                following = asyncio.create_task(session.follow_changes())
                try:
                    await session.ended.wait()
                finally:
                    following.cancel()
                    if session.check:
                        session.check.cancel()
        except Exception as error:  # noqa: BLE001 - none is swallowed: whoever opens a session gets it
            self._failed_at = time.monotonic()
            if not opening.done():
                opening.set_exception(self._why_down(error, heard))
            else:
                log.warning("session with MCP server %s ended: %s", self._server.name, self._clean(_innermost(error)))
        finally:
            session.ended.set()
            if not opening.done():
                opening.cancel()

    def _why_down(self, error: Exception, heard: wire.Heard) -> Exception:
        told = heard.failure()
        if isinstance(told, httpx2.HTTPStatusError):
            return told
        if isinstance(error, ServerDown):
            return error
        words = _innermost(told or error) if not isinstance(error, TimeoutError) else f"no answer within {OPEN_S:g} s"
        return ServerDown(f"MCP server {self._server.name} cannot be reached: {self._clean(words)}")

    # ------------------------------------------------------------ what went wrong

    async def _listing(self, session: Session, wait_s: float) -> Mapping[str, Listed]:
        heard = wire.listen()
        try:
            async with asyncio.timeout(wait_s):
                return await session.tools()
        except (TimeoutError, MCPError, RuntimeError) as error:
            session.doubt()
            raise self._why_down(error, heard) from None

    def _meaning(self, error: MCPError, heard: wire.Heard, session: Session) -> Exception:
        if heard.session_lost and "session" in error.message.lower():
            session.ended.set()
            return ServerDown(f"MCP server {self._server.name} has forgotten the session; a new one is opened")
        return heard.failure() or MCPError(error.code, f"{self._server.name}: {self._clean(error.message)}")

    def _clean(self, text: str) -> str:
        """Without the secrets that were sent with each request, should the server repeat them."""
        for variable in self._server.headers_env.values():
            if secret := os.environ.get(variable, "").rpartition(" ")[2]:
                text = text.replace(secret, "…")
        return text


def _is_over(opening: asyncio.Future[Session]) -> bool:
    return opening.cancelled() or opening.exception() is not None or opening.result().ended.is_set()


def _as_decided(server: McpServer, tool: str, version: str, arguments: Any, found: Listed | None) -> Listed:
    """The tool, if it is still the one that the call was decided for. Raises ToolRefused."""
    if found is None:
        raise ToolRefused(f"server {server.name} has no tool {tool} any more; go on without it")
    if version == UNSEEN:
        try:
            found.validate(arguments)
        except ValidationError as error:
            raise ToolRefused(f"bad arguments for {tool}: {explain(error)}") from None
    elif found.version != version:
        raise ToolRefused(
            f"server {server.name} has changed {tool} since you decided on this call, so nothing was done: "
            "read its description and arguments again, and decide anew"
        )
    return found


def _innermost(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__


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
