"""A service without an address: the call waits with words, and goes on once a worker knows it. Nothing is undone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import CancelledError

from holdfast.authoring.tools import Tool, ToolContext, Undo, tool
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import RunOutcome
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, until
from tests.fixtures.world import World, agent

ADDRESS = "http://127.0.0.1:1"


def booking(effect: Effect) -> Tool:
    @tool(effect=effect, service="desk")
    async def book(ctx: ToolContext) -> str:
        """Books."""
        return f"booked at {ctx.service_url('desk')}"

    if effect is Effect.PROBE:

        @book.probe
        async def booked(ctx: ToolContext) -> str | None:
            return None if ctx.service_url("desk") else "booked"

    return book


@pytest.fixture
def services(lite: Stage) -> Iterator[dict[str, str]]:
    """The addresses that the workers know; the test may add some."""
    services = lite.runtime.settings.services
    yield services
    services.clear()


@pytest.mark.parametrize("effect", Effect)
async def test_a_missing_address_of_a_service_is_waited_for(
    lite: Stage, services: dict[str, str], effect: Effect
) -> None:
    world = World()
    lite.model.script = sequence(call(("reserve", {})), call(("book", {})), say("all done"))
    services["desk"] = ""  # left empty is missing too
    async with lite.worker():
        handle = await lite.start(agent(world.tool("reserve"), booking(effect)))
        seen = await until(handle, lambda status: "no address of service 'desk'" in f"{status.line}{status.steps}")
        assert "HOLDFAST_SERVICES" in f"{seen.line}{seen.steps}"
        services["desk"] = ADDRESS
        result = await asyncio.wait_for(handle.result(), PATIENCE_S)
    # Nothing ever went out, so nobody is asked whether it happened.
    assert (result.outcome, result.pending) == (RunOutcome.COMPLETED, [])
    assert not any("undo" in each for each in world.log)


async def test_an_undo_waits_for_the_address_too(lite: Stage, services: dict[str, str]) -> None:
    undone: list[str] = []

    @tool(effect=Effect.IDEMPOTENT, service="desk")
    async def book(ctx: ToolContext) -> str:
        """Books."""
        return f"booked at {ctx.service_url('desk')}"

    @book.undo
    async def cancel(ctx: ToolContext, undo: Undo) -> str:
        undone.append(ctx.service_url("desk"))
        return "cancelled"

    world = World()
    services["desk"] = ADDRESS
    lite.model.script = sequence(call(("book", {})), call(("ask", {})), say("all done"))
    async with lite.worker():
        handle = await lite.start(agent(book, world.tool("ask", effect=Effect.MANUAL, approval=True)))
        await until(handle, lambda status: bool(status.approvals))
        del services["desk"]
        await handle.cancel()
        await until(handle, lambda status: "no address of service 'desk'" in status.line)
        assert undone == []
        services["desk"] = ADDRESS
        with pytest.raises(WorkflowFailureError) as raised:
            await asyncio.wait_for(handle.result(), PATIENCE_S)
    assert isinstance(raised.value.cause, CancelledError)
    assert undone == [ADDRESS]
