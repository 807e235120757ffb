"""One answer with many tool calls: the model hears how many are taken, and those taken run in a window."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from holdfast.authoring.services import BreakerRule, Service
from holdfast.authoring.tools import Tool, ToolContext, Undo, tool
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import RunOutcome
from holdfast.testing.model import Message, call, say, sequence
from holdfast.testing.stage import Stage, cancelled, failure, until
from tests.fixtures.world import World, agent

LONG = "x[y] " * 700


def told(stage: Stage) -> list[str]:
    """What the tools, and the platform in their place, have told the model."""
    return [m["content"] for m in stage.model.requests[-1][1] if m["role"] == "tool"]


class Busy:
    """A tool that knows how many calls of it are at work. The first calls wait until `at_once` are."""

    def __init__(self, at_once: int = 1) -> None:
        self.now = self.most = self.all = 0
        self._at_once = at_once
        self._full = asyncio.Event()

    def tool(self, **declared: Any) -> Tool:
        @tool(effect=Effect.IDEMPOTENT, service="busy", **declared)
        async def work(ctx: ToolContext, text: str = "") -> str:
            """Works."""
            self.now += 1
            self.all += 1
            self.most = max(self.most, self.now)
            if self.now >= self._at_once:
                self._full.set()
            await self._full.wait()
            await asyncio.sleep(0.01)
            self.now -= 1
            return "worked"

        @work.undo
        async def revert(ctx: ToolContext, undo: Undo) -> str:
            return "undone"

        return work


@pytest.mark.parametrize("many", [33, 300, 2_500])
async def test_more_calls_than_an_agent_takes_go_back_to_the_model_which_chooses_again(lite: Stage, many: int) -> None:
    busy = Busy()

    def script(messages: list[Message]) -> Message:
        refused = any("too many calls" in str(m["content"]) for m in messages if m["role"] == "tool")
        if not refused:
            return call(*(("work", {"text": LONG if many <= 300 else ""}) for _ in range(many)))
        return say("done") if "worked" in str(messages[-1]["content"]) else call(*[("work", {})] * 32)

    lite.model.script = script
    async with lite.worker():
        handle = await lite.start(agent(busy.tool()))
        result = await handle.result()
    assert (result.outcome, result.calls, busy.all) == (RunOutcome.COMPLETED, 32, 32)
    assert told(lite)[many - 1] == (
        f"error: not run: too many calls in one answer: {many:,}, and at most 32 are taken. "
        "Choose the calls that come first; make the others when you have read what these answered."
    )


async def test_a_model_that_always_makes_too_many_calls_fails_the_run_in_words(lite: Stage) -> None:
    lite.model.script = sequence(call(*[("work", {})] * 4))
    async with lite.worker():
        result = await failure(await lite.start(agent(Busy().tool(), max_calls=3)))
    assert "invalid 3 times in a row" in result.reason
    assert "too many calls in one answer: 4, and at most 3 are taken" in result.reason


@pytest.mark.parametrize("options", [{}, {"max_cached_workflows": 0}], ids=["cached", "uncached"])
async def test_the_calls_of_a_turn_run_in_a_window(lite: Stage, options: dict[str, Any]) -> None:
    busy = Busy(at_once=3)
    lite.model.script = sequence(call(*[("work", {"text": LONG})] * 20), say("done"))
    async with lite.worker(**options):
        handle = await lite.start(agent(busy.tool(), parallel_calls=3))
        result = await handle.result()
    assert (result.outcome, busy.all, busy.most) == (RunOutcome.COMPLETED, 20, 3)


async def test_300_long_questions_are_asked_and_answered_while_no_worker_runs(lite: Stage) -> None:
    """All answers come in one workflow task, for which the SDK gives two seconds."""
    busy = Busy()
    lite.model.script = sequence(call(*[("work", {"text": LONG})] * 300), say("done"))
    async with lite.worker():
        handle = await lite.start(agent(busy.tool(approval=True), max_calls=300))
        now = await until(handle, lambda now: len(now.approvals) == 300)
        assert now.line.endswith("Waiting for a human: work (300 times)")
    for n in range(1, 301):
        await handle.signal("decide", {"approval_id": f"a{n}", "verdict": "approve", "approver": "dr.lee"})
    async with lite.worker():
        result = await handle.result()
    assert (result.outcome, busy.all) == (RunOutcome.COMPLETED, 300)
    assert busy.most <= 8


async def test_a_call_that_waits_for_a_person_or_its_service_has_no_place(lite: Stage) -> None:
    """With one place: the first call waits for a person, the second for a service that is down; the third runs."""
    world = World()

    @tool(effect=Effect.READ, service="resting", deferrable=False)
    async def rests(ctx: ToolContext) -> str:
        """Is down until another call of the turn has run."""
        if "done runs#3" not in world.log:
            raise ConnectionRefusedError("down")
        world.log.append("done rests#2")
        return "rested"

    service = Service("resting", breaker=BreakerRule(failures=1, probe_after_s=2))
    asks, runs = world.tool("asks", approval=True), world.tool("runs")
    spec = agent(asks, rests, runs, parallel_calls=1, services=(service,))
    lite.model.script = sequence(call(("asks", {}), ("rests", {}), ("runs", {})), say("done"))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda now: bool(now.approvals))
        await world.saw("done runs#3")
        await world.saw("done rests#2")
        await handle.signal("decide", {"approval_id": "a1", "verdict": "approve", "approver": "dr.lee"})
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert world.log[-1] == "done asks#1"


async def test_cancelled_what_had_no_place_yet_has_nothing_to_undo(lite: Stage) -> None:
    world, never = World(), asyncio.Event()
    lite.model.script = sequence(call(*[("book", {})] * 5), say("done"))
    async with lite.worker():
        handle = await lite.start(agent(world.tool("book", gate=never), parallel_calls=2))
        await world.saw("begin book#2")
        await handle.cancel()
        await cancelled(handle)
        result = await lite.stored(handle)
    assert [undo.seq for undo in result.undone] == [1, 2]
    assert {entry.partition("#")[0] for entry in world.log} == {"begin book", "undo book"}


async def test_a_run_continues_as_new_with_its_window(lite: Stage) -> None:
    busy = Busy()
    lite.model.script = sequence(*[call(*[("work", {})] * 6)] * 3, say("done"))
    async with lite.worker():
        handle = await lite.start(agent(busy.tool(), parallel_calls=2, turns_per_execution=1))
        result = await handle.result()
    assert (result.outcome, busy.all, busy.most) == (RunOutcome.COMPLETED, 18, 2)


@pytest.mark.parametrize("name", ["max_calls", "parallel_calls"])
@pytest.mark.parametrize("wrong", [0, 301, "8", None])
def test_a_limit_that_is_none_is_refused_at_the_declaration(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} has to be a number from 1 to 300, not "):
        agent(Busy().tool(), **{name: wrong})
