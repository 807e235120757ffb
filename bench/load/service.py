"""A service with a real limit: it counts what arrives, and refuses what exceeds its own exact sliding minute."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from holdfast.authoring.services import Limit


@dataclass
class Service:
    """`POST /call` with `{"agent": …, "tokens": …}` answers 200, or 429 when the limit is exceeded."""

    limit: Limit
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """Monotonic time and tokens of each call that came, refused ones too."""
    calls: Counter[str] = field(default_factory=Counter)
    """Calls answered, by agent."""
    refused: int = 0
    _minute: deque[tuple[float, int]] = field(default_factory=deque)
    _tokens: int = 0

    async def call(self, request: Request) -> JSONResponse:
        body = await request.json()
        if not self.arrive(body["agent"], body["tokens"]):
            return JSONResponse({"error": "rate limit"}, 429, {"retry-after": "1"})
        return JSONResponse({"tokens": body["tokens"]})

    def arrive(self, agent: str, tokens: int) -> bool:
        """Counts a call. False when it is refused."""
        now = time.monotonic()
        self.arrivals.append((now, tokens))
        while self._minute and self._minute[0][0] <= now - 60:
            self._tokens -= self._minute.popleft()[1]
        over = self.limit.requests is not None and len(self._minute) >= self.limit.requests
        if over or (self.limit.tokens is not None and self._tokens + tokens > self.limit.tokens):
            self.refused += 1
            return False
        self._minute.append((now, tokens))
        self._tokens += tokens
        self.calls[agent] += 1
        return True

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Its address, while it runs."""
        app = Starlette(routes=[Route("/call", self.call, methods=["POST"])])
        # Agents wait for a minute between two calls; a connection closed meanwhile would break the second.
        config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_keep_alive=600)
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            task = asyncio.create_task(server.serve([listener]))
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}/call"
            finally:
                server.should_exit = True
                await task

    def most_in_a_minute(self) -> tuple[int, int]:
        """Requests and tokens that came in the fullest sliding minute."""
        most = most_tokens = first = tokens = 0
        for last, (at, used) in enumerate(self.arrivals):
            tokens += used
            while self.arrivals[first][0] <= at - 60:
                tokens -= self.arrivals[first][1]
                first += 1
            most, most_tokens = max(most, last - first + 1), max(most_tokens, tokens)
        return most, most_tokens
