"""The HTTP transport to an MCP server, which tells each call what happened to its own request.

The client library turns an HTTP status or a transport error into one vague protocol error, and a refused connection
ends the whole session with every call in flight. This transport keeps the error for the call that it belongs to. The
call raises it, and `holdfast.reliability.errors` classifies it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass

import httpx2

BRIEF_S = 5.0
"""Timeout in seconds of requests that no call waits for: notifications, the end of a session. The library sends them
one after the other."""
_SAYS_IT = frozenset({401, 402, 403, 408, 425, 429})
"""Statuses that say more than the JSON-RPC error that may come with them, as 3xx and 5xx do."""


@dataclass
class Heard:
    """The HTTP result of a call's last request."""

    error: httpx2.TransportError | None = None
    response: httpx2.Response | None = None
    """The answer, when its status is not 200."""

    @property
    def session_lost(self) -> bool:
        """Whether the server does not know our session, so that it has not processed the request."""
        told = self.response
        return told is not None and told.status_code in (400, 404) and "mcp-session-id" in told.request.headers

    def failure(self) -> Exception | None:
        """Returns the HTTP error when it says more than the protocol error, else None."""
        if self.error is not None:
            return self.error
        told = self.response
        if told is None or (told.status_code < 500 and told.status_code not in _SAYS_IT and told.status_code >= 400):
            return None
        if told.status_code == 202:  # a request without an answer
            return httpx2.DecodingError("answered 202, which is no answer to a call", request=told.request)
        return httpx2.HTTPStatusError(f"status {told.status_code}", request=told.request, response=told)


_heard: ContextVar[Heard | None] = ContextVar("heard", default=None)


def listen() -> Heard:
    """Returns a record of the requests that are sent from now on by this task, or for it."""
    heard = Heard()
    _heard.set(heard)
    return heard


class Wire(httpx2.AsyncHTTPTransport):
    """Records errors for the sender, and keeps the failure of one request from ending the session."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        heard = _heard.get() or Heard()
        if request.method == "DELETE" or b'"method":"notifications/' in await request.aread():
            request.extensions = {**request.extensions, "timeout": httpx2.Timeout(BRIEF_S).as_dict()}
            heard = Heard()  # belongs to no call
        heard.error = heard.response = None
        try:
            response = await super().handle_async_request(request)
        except httpx2.TransportError as error:
            heard.error = error
            return httpx2.Response(503, request=request)
        response.request = request
        if response.status_code != 200:
            heard.response = response
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Body(response.stream, heard)
        return response


class _Body(httpx2.AsyncByteStream):
    """A response body that ends where the connection breaks, and records the error: the library then fails only this
    request."""

    def __init__(self, stream: httpx2.AsyncByteStream, heard: Heard) -> None:
        self._stream = stream
        self._heard = heard

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._stream:
                yield part
        except httpx2.TransportError as error:
            self._heard.error = error

    async def aclose(self) -> None:
        await self._stream.aclose()
