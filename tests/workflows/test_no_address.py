"""A service without an address: the call waits with words, and goes on once a worker knows it. Nothing is undone."""

from __future__ import annotations

import asyncio

from holdfast.contracts import Effect, RunOutcome
from holdfast.tools import ToolContext, tool
from tests.fixtures.clock import PATIENCE_S
from tests.fixtures.model import call, say, sequence
from tests.fixtures.temporal import Stage, until
from tests.fixtures.world import World, agent


@tool(effect=Effect.MANUAL, service="desk")
async def book(ctx: ToolContext) -> str:
    """Books."""
    return f"booked at {ctx.service_url('desk')}"


async def test_a_missing_address_of_a_service_is_waited_for(lite: Stage) -> None:
    world = World()
    lite.model.script = sequence(call(("reserve", {})), call(("book", {})), say("all done"))
    async with lite.worker():
        handle = await lite.start(agent(world.tool("reserve"), book))
        seen = await until(handle, lambda status: "no address of service 'desk'" in f"{status.line}{status.steps}")
        assert "HOLDFAST_SERVICES" in f"{seen.line}{seen.steps}"
        lite.runtime.settings.services["desk"] = "http://127.0.0.1:1"
        result = await asyncio.wait_for(handle.result(), PATIENCE_S)
    assert result.outcome is RunOutcome.COMPLETED
    assert not any("undo" in each for each in world.log)
