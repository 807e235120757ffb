"""Long activities: one whose worker dies goes on from its last position, and one that hangs ends and frees its slot."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from temporalio.client import WorkflowHandle

from holdfast.authoring.tools import ToolContext, tool
from holdfast.contracts.profile import Effect
from holdfast.testing.model import Message, call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage
from tests.fixtures.wire import Then, wire
from tests.fixtures.world import World, agent
from tests.integration.activities.long_worker import SPEC
from tests.integration.activities.processes import workers


class Archive:
    """Takes pages. Page 3 is answered only once it is asked for again."""

    def __init__(self) -> None:
        self.pages: list[int] = []

    async def take(self, request: Request) -> PlainTextResponse:
        page = int(request.path_params["page"])
        self.pages.append(page)
        while self.pages.count(3) == 1 and page == 3:
            await asyncio.sleep(0.02)
        return PlainTextResponse("taken")

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        app = Starlette(routes=[Route("/{page}", self.take, methods=["POST"])])
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


async def position(handle: WorkflowHandle[Any, Any]) -> tuple[int, int] | None:
    """The process that has the run's open activity, and how far the server has heard that it has come."""
    for each in (await handle.describe()).raw_description.pending_activities:
        for told in each.heartbeat_details.payloads:
            return int(each.last_worker_identity.partition("@")[0]), json.loads(told.data)[1]
    return None


async def test_after_its_worker_was_killed_a_long_call_goes_on_from_its_last_position(
    lite: Stage, tmp_path: Path
) -> None:
    archive = Archive()
    async with archive.serve() as url, workers(lite, tmp_path, "long_worker") as processes:
        lite.model.script = sequence(call(("copy_pages", {"url": url, "pages": 6})), say("done"))
        handle = await lite.start(SPEC)
        async with asyncio.timeout(PATIENCE_S):
            while not (found := await position(handle)) or found[1] < 3:
                await asyncio.sleep(0.02)
            doomed = processes[found[0]]
            doomed.signal(signal.SIGKILL)
            await handle.result()
        assert not doomed.alive
    assert archive.pages == [0, 1, 2, 3, 3, 4, 5]
    assert told(lite) == ["attempt 2 copied from page 3"]


def told(stage: Stage) -> list[str]:
    """What the model has heard of the calls it made."""
    _, messages = stage.model.requests[-1]
    return [message["content"] for message in messages if message["role"] == "tool"]


@tool(effect=Effect.READ, service="deaf", timeout=0.3, retries=0)
async def listen(ctx: ToolContext, url: str) -> str:
    """Ask somebody who never answers."""
    return (await ctx.http.get(url)).text


@tool(effect=Effect.READ, service="deaf", timeout=0.3, retries=0)
def listen_in_a_thread(ctx: ToolContext, url: str) -> str:
    """Ask somebody who never answers, by a call that blocks its thread."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return connection.recv(100).decode()


@pytest.mark.parametrize("deaf", [listen, listen_in_a_thread])
async def test_a_call_that_hangs_ends_at_its_limit_and_frees_its_slot(lite: Stage, deaf: Any) -> None:
    world = World()
    spec = agent(deaf, world.tool("book"), steps=[])
    async with wire(Then.HANG) as service, lite.worker(max_concurrent_activities=1):

        def script(messages: list[Message]) -> Message:
            if messages[-1]["role"] == "user":
                return call((deaf.name, {"url": service.url}), ("book", {"n": 1}))
            return say("done")

        lite.model.script = script
        async with asyncio.timeout(PATIENCE_S):
            await (await lite.start(spec)).result()
        assert len(service.requests) == 1
    hung, booked = told(lite)
    assert "no answer from deaf within 0.3 s" in hung
    assert booked == "book#2 done"
