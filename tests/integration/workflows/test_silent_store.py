"""A run whose worker loses its database: to silence, to a lost answer, to a restart. It goes on and doubles nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from temporalio.testing import WorkflowEnvironment

from holdfast.authoring.tools import ToolContext, tool
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import RunOutcome
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import a_stage
from tests.fixtures.proxy import Proxy
from tests.fixtures.world import agent

LOSSES: dict[str, Callable[[Proxy], None]] = {
    "silence": Proxy.silence,
    "lost answers": lambda proxy: proxy.silence(answers_only=True),
    "a restart": Proxy.refuse,
}


@pytest.mark.parametrize("how", LOSSES)
async def test_a_run_goes_on_when_its_store_is_away_during_a_call(
    temporal: WorkflowEnvironment, silent: tuple[Proxy, str], how: str
) -> None:
    """`manual`: a doubt would become a question to a person."""
    proxy, url = silent
    booked: list[str] = []
    lost = asyncio.Event()

    @tool(effect=Effect.MANUAL, service="desk")
    async def book(ctx: ToolContext) -> str:
        """Books."""
        booked.append(ctx.key)
        LOSSES[how](proxy)
        lost.set()
        return "booked"

    async def comes_back() -> None:
        await lost.wait()
        if how == "a restart":
            await asyncio.sleep(2)  # how long the outage is, not what is waited for
            proxy.accept()
        else:
            while not proxy.swallowed:
                await asyncio.sleep(0.01)
            proxy.talk()

    async with a_stage(temporal.client, url, store_timeout_s=1.0) as stage:
        stage.model.script = sequence(call(("book", {})), say("all done"))
        async with stage.worker():
            handle = await stage.start(agent(book))
            outage = asyncio.create_task(comes_back())
            result = await asyncio.wait_for(handle.result(), PATIENCE_S)
        await outage
        assert (result.outcome, len(booked)) == (RunOutcome.COMPLETED, 1)
        assert await stage.stored(handle) == result
