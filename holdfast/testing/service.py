"""A service over real HTTP whose answers a test writes as a function of the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


@asynccontextmanager
async def served(app: Starlette) -> AsyncIterator[str]:
    """Serves an application at a free port of this machine; its address, without a slash at the end."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@dataclass(frozen=True)
class Asked:
    """A request that a fake service has received."""

    method: str
    path: str
    key: str
    """Its `Idempotency-Key`; empty when it has none."""
    body: Any
    """The JSON that came with it; None when none came."""


@dataclass
class FakeService:
    """A service that knows what it was asked, in order."""

    script: Callable[[Asked], Any] = field(default=lambda asked: {})
    """What it does with a request. Its result is sent as JSON; a `Response` is sent as it is."""
    failing: list[int] = field(default_factory=list)
    """The statuses of the next answers, one each, which it gives without doing anything."""
    requests: list[Asked] = field(default_factory=list)
    url: str = ""

    async def _answer(self, request: Request) -> Response:
        body = await request.json() if await request.body() else None
        key = request.headers.get("idempotency-key", "")
        asked = Asked(request.method, request.url.path, key, body)
        self.requests.append(asked)
        if self.failing:
            return Response(status_code=self.failing.pop(0))
        said = self.script(asked)
        return said if isinstance(said, Response) else JSONResponse(said)

    @classmethod
    @asynccontextmanager
    async def serve(cls, script: Callable[[Asked], Any] | None = None) -> AsyncIterator[FakeService]:
        service = cls() if script is None else cls(script)
        methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
        async with served(Starlette(routes=[Route("/{path:path}", service._answer, methods=methods)])) as service.url:
            yield service
