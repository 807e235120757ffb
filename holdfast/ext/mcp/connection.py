"""The connection to one MCP server: all calls of this process share one session.

The first call opens the session; the first call after its end opens a new one. The library requires that one task opens
and closes a session, so each session has an owner task. Any task can call through it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import httpx2
from mcp import MCPError
from pydantic import ValidationError

from holdfast.contracts.failures import ToolRefused, explain
from holdfast.ext.mcp import transport
from holdfast.ext.mcp.failures import BadAnswer, ServerDown
from holdfast.ext.mcp.listing import Listed, content
from holdfast.ext.mcp.session import Session
from holdfast.ext.mcp.spec import UNSEEN, McpServer

log = logging.getLogger(__name__)

OPEN_S = 30.0
"""Seconds for a server to start, to complete the handshake and to list its tools."""
REST_S = 2.0
"""Seconds between a failed attempt to open a session and the next one; calls in between fail at once."""
CLOSE_S = 10.0
KEY_META = "holdfast/idempotency-key"
"""The name in `_meta` under which each call sends its idempotency key."""


class Connection:
    """The connection to one server. `known` is its last listing, which outlives the session."""

    def __init__(self, server: McpServer) -> None:
        self._server = server
        self.known: Mapping[str, Listed] | None = None
        self._opening: asyncio.Future[Session] | None = None
        self._owners: set[asyncio.Task[None]] = set()
        self._failed_at = float("-inf")

    async def tools(self, connect_s: float) -> Mapping[str, Listed]:
        """Returns the server's current tools or, when it does not answer, those of its last answer.

        Raises ServerDown or HTTPStatusError when the server has never answered this process.
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

        Raises ToolRefused when the tool has changed since the decision, when the arguments do not fit it, or when it
        answers with an error; ServerDown when nothing was sent; BadAnswer, MCPError, httpx2's errors.
        """
        session = await self._session(connect_s)
        found = (await self._listing(session, connect_s)).get(tool)
        found = _as_decided(self._server, tool, version, arguments, found)
        heard = transport.listen()
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
            raise ToolRefused(self._clean(content(result)) or f"{tool} failed and gave no reason")
        return content(result)

    async def close(self) -> None:
        """Ends the session and its process."""
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
        """Returns a session that is not known to be dead. Raises ServerDown after `wait_s` seconds; the opening goes
        on."""
        deadline = time.monotonic() + wait_s
        opening = self._opening
        if opening is None or (opening.done() and _is_over(opening)):
            if opening and not opening.cancelled() and opening.exception() and self._rests():
                opening.result()  # raises
            opening = self._opening = asyncio.get_running_loop().create_future()
            # Retrieves the exception, so that asyncio does not log it as never retrieved when all callers have gone.
            opening.add_done_callback(lambda done: done.cancelled() or done.exception())
            owner = asyncio.create_task(self._own(opening), name=f"mcp {self._server.name}")
            self._owners.add(owner)
            owner.add_done_callback(self._owners.discard)
        await asyncio.wait((opening,), timeout=wait_s)
        if not opening.done():
            raise ServerDown(f"MCP server {self._server.name} was not ready within {wait_s:g} s")
        session = opening.result()
        if session.check is not None and not session.check.done():
            await asyncio.wait((session.check,), timeout=max(0.0, deadline - time.monotonic()))
            if not session.check.done() or session.ended.is_set():
                raise ServerDown(f"MCP server {self._server.name} does not answer")
        return session

    def _rests(self) -> bool:
        return time.monotonic() - self._failed_at < REST_S

    async def _own(self, opening: asyncio.Future[Session]) -> None:
        """Opens a session, holds it until its end and closes it. A failure becomes the exception of `opening`."""
        heard = transport.listen()
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
        except Exception as error:  # noqa: BLE001 - not swallowed: the callers that wait for the session get it
            self._failed_at = time.monotonic()
            if not opening.done():
                opening.set_exception(self._why_down(error, heard))
            else:
                log.warning("session with MCP server %s ended: %s", self._server.name, self._clean(_innermost(error)))
        finally:
            session.ended.set()
            if not opening.done():
                opening.cancel()

    def _why_down(self, error: Exception, heard: transport.Heard) -> Exception:
        told = heard.failure()
        if isinstance(told, httpx2.HTTPStatusError):
            return told
        if isinstance(error, ServerDown):
            return error
        words = _innermost(told or error) if not isinstance(error, TimeoutError) else f"no answer within {OPEN_S:g} s"
        return ServerDown(f"MCP server {self._server.name} cannot be reached: {self._clean(words)}")

    # ------------------------------------------------------------ what went wrong

    async def _listing(self, session: Session, wait_s: float) -> Mapping[str, Listed]:
        heard = transport.listen()
        try:
            async with asyncio.timeout(wait_s):
                return await session.tools()
        except (TimeoutError, MCPError, RuntimeError) as error:
            session.doubt()
            raise self._why_down(error, heard) from None

    def _meaning(self, error: MCPError, heard: transport.Heard, session: Session) -> Exception:
        if heard.session_lost and "session" in error.message.lower():
            session.ended.set()
            return ServerDown(f"MCP server {self._server.name} has lost the session; the next call opens a new one")
        return heard.failure() or MCPError(error.code, f"{self._server.name}: {self._clean(error.message)}")

    def _clean(self, text: str) -> str:
        """Removes the secrets that each request carries, in case the server repeats them."""
        for variable in self._server.headers_env.values():
            if secret := os.environ.get(variable, "").rpartition(" ")[2]:
                text = text.replace(secret, "…")
        return text


def _is_over(opening: asyncio.Future[Session]) -> bool:
    return opening.cancelled() or opening.exception() is not None or opening.result().ended.is_set()


def _as_decided(server: McpServer, tool: str, version: str, arguments: Any, found: Listed | None) -> Listed:
    """Returns the tool if it has not changed since the model decided on the call. Raises ToolRefused."""
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
