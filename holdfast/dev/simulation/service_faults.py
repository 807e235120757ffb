"""Fault injection over HTTP: a simulated service fails, is slow, hangs, or drops the connection after the effect.

PUT    /faults/{service}   {"mode": "fail", "times": 2, "status": 503, "retry_after": 1}
GET    /faults             the faults in force
DELETE /faults             clears all faults
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from holdfast.contracts.data import Json
from holdfast.contracts.failures import explain


class Fault(BaseModel):
    """What goes wrong with the next requests of a service.

    fail: answers `status` (with `Retry-After: retry_after`, seconds, if given) before any effect.
    slow: waits `seconds`, then does the effect and answers.
    hang: never answers; no effect.
    drop: does the effect, then closes the connection: before an answer of one piece, in the middle of a stream.
    """

    model_config = ConfigDict(extra="forbid")

    mode: Literal["fail", "slow", "hang", "drop"]
    times: int | None = Field(default=None, ge=1)
    """The number of requests; None: until the fault is cleared."""
    status: int = Field(default=503, ge=400, le=599)
    seconds: float = Field(default=3.0, ge=0)
    retry_after: float | None = Field(default=None, ge=0)
    method: str | None = None
    """Only for this HTTP method."""


class FaultBoard:
    """The faults in force, one per service. They live in memory: a restarted service has none."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = services
        self._faults: dict[str, Fault] = {}

    def take(self, service: str, method: str) -> Fault | None:
        """The fault for this request, counted down."""
        fault = self._faults.get(service)
        if fault is None or (fault.method or method).upper() != method:
            return None
        if fault.times is not None:
            fault.times -= 1
            if fault.times == 0:
                del self._faults[service]
        return fault

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/faults/{service}", self._put, methods=["PUT"]),
            Route("/faults", self._get, methods=["GET"]),
            Route("/faults", self._clear, methods=["DELETE"]),
        ]

    async def _put(self, request: Request) -> Response:
        service = request.path_params["service"]
        if service not in self._services:
            return refusal(404, f"no service {service!r}; there are: {', '.join(self._services)}")
        try:
            self._faults[service] = Fault.model_validate_json(await request.body())
        except ValidationError as error:
            return refusal(400, explain(error))
        return self._answer()

    async def _get(self, request: Request) -> Response:
        return self._answer()

    async def _clear(self, request: Request) -> Response:
        self._faults.clear()
        return self._answer()

    def _answer(self) -> Response:
        return JSONResponse({service: fault.model_dump() for service, fault in self._faults.items()})


def refusal(status: int, why: str) -> Response:
    """An error answer."""
    return JSONResponse(error_body(why), status)


def error_body(why: str) -> Json:
    """An error in the format of OpenAI clients and ours."""
    return {"error": {"message": why, "type": "simulated", "code": None}}


async def under(fault: Fault | None, handle: Callable[[], Awaitable[Response]]) -> Response:
    """The answer of `handle` with the fault applied. A call of `handle` does the effect."""
    if fault is None:
        return await handle()
    if fault.mode == "fail":
        response = refusal(fault.status, "fault on order")
        if fault.retry_after is not None:
            response.headers["Retry-After"] = f"{fault.retry_after:g}"
        return response
    if fault.mode == "hang":
        return Silence()
    if fault.mode == "slow":
        await asyncio.sleep(fault.seconds)
        return await handle()
    return Cut(await handle())


class Silence(Response):
    """Never answers; ends when the client disconnects."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            # At shutdown the server would answer 500 when this task ends; a hung service answers nothing.
            scope["state"]["transport"].abort()


class _LineCut(Exception):
    """Stops the rest of an answer after the connection was cut."""


class Cut(Response):
    """Closes the connection instead of sending `answer`; of a streamed answer, the first chunk still goes out."""

    def __init__(self, answer: Response) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Message] = []
        started = False

        async def cutting(message: Message) -> None:
            nonlocal started
            held.append(message)
            if message["type"] != "http.response.body":
                return
            if started or not message.get("more_body"):
                scope["state"]["transport"].close()
                raise _LineCut
            started = True
            for each in held:
                await send(each)

        try:
            await self._answer(scope, receive, cutting)
        except _LineCut:
            await Silence()(scope, receive, send)
