"""A run that ends settles its effects and nothing else: what only reads or asks a model is dropped at once."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from holdfast.authoring.services import BreakerRule, Service
from holdfast.authoring.tools import Tool, ToolContext, tool
from holdfast.contracts.profile import Effect, StepSpec
from holdfast.contracts.run import Phase, RunOutcome
from holdfast.contracts.tool_call import UndoStatus
from holdfast.contracts.turn import OutcomeStatus
from holdfast.recovery.model import doubtful
from holdfast.testing.model import Message, call, error, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, cancelled, failure, until
from tests.fixtures.world import World, agent


class Endless:
    """Tools whose calls never end by themselves, and whether they were stopped."""

    def __init__(self) -> None:
        self.begun, self.stopped = asyncio.Event(), asyncio.Event()

    async def _go_on(self, ctx: ToolContext, asks: bool) -> str:
        self.begun.set()
        try:
            for n in range(100_000):
                if asks:
                    await ctx.ask_model(f"part-{n}", [{"role": "user", "content": f"part {n}"}])
                else:
                    await asyncio.sleep(0.1)
        finally:
            self.stopped.set()
        return "never"

    def read(self) -> Tool:
        @tool(effect=Effect.READ, service="library", timeout=600)
        async def study(ctx: ToolContext) -> str:
            """Study."""
            return await self._go_on(ctx, asks=False)

        return study

    def ask(self) -> Tool:
        @tool(effect=Effect.IDEMPOTENT, service="model", timeout=600, deferrable=False)
        async def study(ctx: ToolContext) -> str:
            """Study."""
            return await self._go_on(ctx, asks=True)

        return study


def studying(messages: list[Message]) -> Message:
    return say("noted") if str(messages[-1]["content"]).startswith("part") else call(("study", {}), ("book", {}))


@pytest.mark.parametrize("by", ["cancel", "deadline"])
@pytest.mark.parametrize("kind", ["read", "ask"])
async def test_what_only_reads_or_asks_a_model_is_dropped_and_effects_are_undone(
    lite: Stage, kind: str, by: str
) -> None:
    world, endless = World(), Endless()
    more: dict[str, Any] = {"deadline": timedelta(seconds=6)} if by == "deadline" else {}
    spec = agent(endless.read() if kind == "read" else endless.ask(), world.tool("book"), **more)
    lite.model.script = studying
    async with lite.worker():
        handle = await lite.start(spec)
        await endless.begun.wait()
        await world.saw("done book#2")
        if by == "cancel":
            await handle.cancel()
            await cancelled(handle)
        else:
            assert (await failure(handle)).reason.startswith("deadline")
        async with asyncio.timeout(PATIENCE_S):
            await endless.stopped.wait()
        result = await lite.stored(handle)
    assert world.log[-1] == "undo book#2"
    assert (result.steps[0].name, result.steps[0].status) == ("study", "todo")
    assert result.pending == []
    assert doubtful(await lite.runtime.ledger.entries(result.key_base)) == []


async def test_a_cancelled_call_that_would_wait_for_its_model_waits_no_more(lite: Stage) -> None:
    """The cancellation comes while an attempt is under way, which ends by asking to wait."""
    begun, go = asyncio.Event(), asyncio.Event()
    tries = 0

    @tool(effect=Effect.IDEMPOTENT, service="world", deferrable=False, timeout=60)
    async def think(ctx: ToolContext) -> str:
        """Think."""
        nonlocal tries
        tries += 1
        begun.set()
        await go.wait()
        return (await ctx.ask_model("thought", [{"role": "user", "content": "part"}])).text

    lite.model.script = lambda m: error(401) if m[-1]["content"] == "part" else call(("think", {}))
    async with lite.worker():
        handle = await lite.start(agent(think))
        await begun.wait()
        await handle.cancel()
        asyncio.get_running_loop().call_later(1.5, go.set)  # past the next heartbeats, which tell of the cancel
        async with asyncio.timeout(PATIENCE_S):
            await cancelled(handle)
    assert tries == 1


async def test_while_an_undo_waits_the_status_says_what_is_still_to_be_undone(lite: Stage) -> None:
    world = World()
    rule = BreakerRule(failures=3, probe_after_s=1.5)
    spec = agent(
        world.tool("book"),
        world.tool("order"),
        world.tool("send", approval=True),
        services=(Service("world", breaker=rule),),
    )
    lite.model.script = sequence(call(("book", {})), call(("order", {})), call(("send", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda now: bool(now.approvals))
        await lite.runtime.guards.breaker.trip("world", "moving house", "lee")
        await handle.cancel()
        now = await until(handle, lambda now: "Parked: world may not be called" in now.line)
        assert now.phase is Phase.COMPENSATING
        assert now.outcome is RunOutcome.CANCELLED
        assert "Still to be undone: order (#2), book (#1)" in now.line
        assert [(each.tool, each.status) for each in now.undone] == [
            ("book", UndoStatus.REGISTERED),
            ("order", UndoStatus.REGISTERED),
        ]
        await lite.runtime.guards.breaker.reset("world", "lee")
        await cancelled(handle)
    assert world.log[-2:] == ["undo order#2", "undo book#1"]


# ------------------------------------------------------------ without an effect there is nothing to find out


@pytest.mark.parametrize("critical", [True, False], ids=["critical", "optional"])
async def test_a_call_that_only_asks_a_model_fails_and_is_never_in_doubt(lite: Stage, critical: bool) -> None:
    @tool(effect=Effect.IDEMPOTENT, service="model", timeout=0.2, retries=0, deferrable=False)
    async def extract(ctx: ToolContext) -> str:
        """Extract."""
        await asyncio.Event().wait()
        return "never"

    step = StepSpec(name="terms", tools=["extract"], critical=critical, role="lawyer")
    lite.model.script = sequence(call(("extract", {})), say("no terms"))
    async with lite.worker():
        handle = await lite.start(agent(extract, steps=[step]))
        if critical:
            result = await failure(handle)
            assert result.reason.startswith("critical step gone: terms: ")
        else:
            result = await handle.result()
            assert result.outcome is RunOutcome.PARTIAL
        decided = [each.approval.about for each in result.decisions]
    assert OutcomeStatus.UNKNOWN not in decided
    assert "may have happened" not in result.model_dump_json()
    assert doubtful(await lite.runtime.ledger.entries(result.key_base)) == []
