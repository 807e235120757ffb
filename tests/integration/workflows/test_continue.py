"""Continue-as-new: nothing is lost when a run's history is cut, wherever that happens."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from temporalio.client import WorkflowHandle

from holdfast.authoring.tools import ToolContext, tool
from holdfast.contracts.data import Json
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import Phase, RunOutcome, StepStatus
from holdfast.contracts.tool_call import key_base
from holdfast.engine.client import AGENT, STATUS, TENANT
from holdfast.testing.model import call, error, say, sequence, turn
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, cancelled, failure, status, until
from tests.fixtures.world import World, agent

uncached_too = pytest.mark.parametrize("options", [{}, {"max_cached_workflows": 0}], ids=["cached", "uncached"])


async def executions(stage: Stage, handle: WorkflowHandle[Any, Any]) -> list[str]:
    """Run ids of a run, the first first."""
    found = [e async for e in stage.client.list_workflows(f"WorkflowId = '{handle.id}'")]
    return [e.run_id for e in sorted(found, key=lambda e: e.start_time)]


async def another(handle: WorkflowHandle[Any, Any], before: str | None) -> str:
    """Waits until the run goes on under another run id than `before`; the new one."""
    async with asyncio.timeout(PATIENCE_S):
        while (now := (await handle.describe()).run_id) == before:
            await asyncio.sleep(0.02)
    assert now
    return now


@uncached_too
async def test_at_every_turn_with_parallel_tools_nothing_is_lost(stage: Stage, options: Json) -> None:
    world = World()
    spec = agent(world.tool("book"), world.tool("order"), turns_per_execution=1)
    stage.model.script = sequence(
        call(("book", {}), ("order", {})), call(("book", {"n": 2})), call(("order", {"n": 3})), say("done")
    )
    async with stage.worker(**options):
        handle = await stage.start(spec)
        result = await handle.result()
        assert (result.outcome, result.turns, result.calls) == (RunOutcome.COMPLETED, 4, 4)
        assert result.usage.calls == 4
        # One ledger base, and keys that count on over the cuts.
        assert result.key_base == key_base(handle.id, handle.first_execution_run_id or "")
        assert sorted(world.keys) == [f"{result.key_base}/{n}" for n in (1, 2, 3, 4)]
        assert len(stage.model.requests) == 4
        # The model hears its whole conversation.
        assert sum(m["role"] == "tool" for m in stage.model.requests[-1][1]) == 4
        async with asyncio.timeout(PATIENCE_S):
            while len(await executions(stage, handle)) < 4:  # visibility is eventually consistent
                await asyncio.sleep(0.05)
    assert await stage.stored(handle) == result


@uncached_too
async def test_with_approvals_pending_and_a_tool_beside_them(lite: Stage, options: Json) -> None:
    world, gate = World(), asyncio.Event()
    spec = agent(
        world.tool("book"), world.tool("send", approval=True), world.tool("slow", gate=gate), turns_per_execution=1
    )
    lite.model.script = sequence(
        call(("book", {})), call(("send", {"n": 1}), ("slow", {}), ("send", {"n": 2})), say("done")
    )
    async with lite.worker(**options):
        handle = await lite.start(spec)
        await until(handle, lambda s: len(s.approvals) == 2)
        await world.saw("begin slow#3")
        await handle.signal("decide", {"approval_id": "a9", "verdict": "approve", "approver": "dr.no"})
        asked = await until(handle, lambda s: bool(s.notes))
        busy = (await handle.describe()).run_id
        gate.set()
        await another(handle, busy)  # only the humans are waited for: the history is cut
        now = await status(handle)
        assert now.approvals == asked.approvals
        assert (now.notes, now.usage, now.turn, now.calls) == (asked.notes, asked.usage, 2, 4)
        assert [s.status for s in now.steps] == [StepStatus.DONE, StepStatus.WAITING, StepStatus.DONE]
        for name in ("a4", "a2"):
            await handle.signal("decide", {"approval_id": name, "verdict": "approve", "approver": "dr.lee"})
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert sorted(e for e in world.log if e.startswith("done")) == [
        "done book#1",
        "done send#2",
        "done send#4",
        "done slow#3",
    ]
    assert [d.approval for d in result.decisions] == [asked.approvals[1], asked.approvals[0]]


async def test_no_signal_that_arrives_meanwhile_is_lost(lite: Stage) -> None:
    """Signals are sent without a pause over several cuts; each one is decided, or noted."""
    world = World()
    spec = agent(world.tool("send", approval=True), turns_per_execution=1)
    lite.model.script = lambda m: (
        say("done") if turn(m) > 5 else call(*(("send", {"n": turn(m) * 5 + k}) for k in range(5)))
    )
    sent: list[str] = []
    async with lite.worker():
        handle = await lite.start(spec)

        async def answer(approval: str) -> None:
            for decision in (
                {"approval_id": f"x-{approval}", "verdict": "approve", "approver": "dr.no"},
                {"approval_id": approval, "verdict": "approve", "approver": "dr.lee"},
            ):
                await handle.signal("decide", decision)
                sent.append(decision["approval_id"])

        answered: set[str] = set()
        async with asyncio.timeout(PATIENCE_S):
            while (now := await status(handle)).outcome is None:
                new = {a.id for a in now.approvals} - answered
                answered |= new
                await asyncio.gather(*(answer(name) for name in sorted(new)))
        result = await handle.result()
        notes = (await status(handle)).notes
    assert len(sent) == 50
    assert result.outcome is RunOutcome.COMPLETED
    assert {d.approval.id for d in result.decisions} == {f"a{n}" for n in range(1, 26)}
    for n in range(1, 26):
        assert sum(f"'x-a{n}'" in note for note in notes) == 1
    assert sorted(world.log) == sorted(f"{what} send#{n}" for n in range(1, 26) for what in ("begin", "done"))


async def test_a_decision_in_the_very_task_that_continues(lite: Stage) -> None:
    """No workflow worker runs while the last tool ends and one of two decisions arrives: one task sees both."""
    world, gate = World(), asyncio.Event()
    spec = agent(world.tool("send", approval=True), world.tool("slow", gate=gate), turns_per_execution=1)
    lite.model.script = sequence(call(("send", {}), ("slow", {}), ("send", {"n": 2})), say("done"))
    async with lite.worker(activities_only=True):
        async with lite.worker(workflows_only=True):
            handle = await lite.start(spec)
            await until(handle, lambda s: len(s.approvals) == 2)
            await world.saw("begin slow#2")
        before = (await handle.describe()).run_id
        await handle.signal("decide", {"approval_id": "a1", "verdict": "approve", "approver": "dr.lee"})
        gate.set()
        await completed_activities(handle, 2)
        async with lite.worker(workflows_only=True):
            await world.saw("done send#1")
            await another(handle, before)
            await handle.signal("decide", {"approval_id": "a3", "verdict": "approve", "approver": "dr.lee"})
            result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert sorted(world.log) == [
        "begin send#1",
        "begin send#3",
        "begin slow#2",
        "done send#1",
        "done send#3",
        "done slow#2",
    ]


async def completed_activities(handle: WorkflowHandle[Any, Any], count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            events = (await handle.fetch_history()).events
            if sum(e.HasField("activity_task_completed_event_attributes") for e in events) == count:
                return
            await asyncio.sleep(0.05)


@uncached_too
async def test_what_was_done_before_the_cut_is_undone_after_it(lite: Stage, options: Json) -> None:
    world = World()
    spec = agent(world.tool("book"), world.tool("order"), world.tool("send", approval=True), turns_per_execution=1)
    lite.model.script = sequence(call(("book", {})), call(("order", {})), call(("send", {})))
    async with lite.worker(**options):
        handle = await lite.start(spec)
        asked = await until(handle, lambda s: bool(s.approvals))
        await another(handle, None)
        await handle.cancel()
        await cancelled(handle)
    assert asked.turn == 3
    assert world.log[-2:] == ["undo order#2", "undo book#1"]
    assert [(u.seq, u.status) for u in (await lite.stored(handle)).undone] == [(1, "undone"), (2, "undone")]


async def test_counters_go_on_over_the_cut(lite: Stage) -> None:
    """Turns and refusals to finish are counted over the whole run, not over one execution."""
    world = World()
    spec = agent(world.tool("book"), turns_per_execution=1, max_turns=3)
    lite.model.script = lambda m: call(("book", {"n": turn(m)}))
    lazy = agent(world.tool("book"), turns_per_execution=1)
    async with lite.worker():
        assert (await failure(await lite.start(spec))).reason.startswith("max turns: 3")
        lite.model.script = lambda m: say("done")
        assert (await failure(await lite.start(lazy))).reason.startswith("critical step gone")
    assert len(lite.model.requests) == 3 + 3


async def test_a_loop_is_seen_over_the_cut(lite: Stage) -> None:
    @tool(effect=Effect.READ, service="x")
    async def look(ctx: ToolContext) -> str:
        """Look."""
        return "the same"

    spec = agent(look, turns_per_execution=1)
    lite.model.script = lambda m: call(("look", {}))
    async with lite.worker():
        result = await failure(await lite.start(spec))
    assert result.reason.startswith("loop without progress")
    assert result.turns == 4


async def test_the_deadline_is_of_the_whole_run(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"), turns_per_execution=1, deadline=timedelta(seconds=3), max_turns=500)
    lite.model.script = lambda m: call(("book", {"n": turn(m)}))
    async with lite.worker():
        result = await failure(await lite.start(spec))
    assert result.reason.startswith("deadline")
    assert result.turns > 1, "each execution alone is far shorter than the deadline"


async def test_a_parked_run_goes_on_in_its_next_execution(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"), turns_per_execution=1)
    answering, broken = sequence(call(("book", {})), say("done")), True
    lite.model.script = lambda m: error(401) if broken and turn(m) == 2 else answering(m)
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: s.phase is Phase.PARKED)
        broken = False
        result = await handle.result()
    assert (result.outcome, result.turns, world.log) == (RunOutcome.COMPLETED, 2, ["begin book#1", "done book#1"])


async def test_search_attributes_are_kept(lite: Stage) -> None:
    spec = agent(World().tool("send", approval=True), turns_per_execution=1)
    lite.model.script = sequence(call(("send", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        first = (await handle.describe()).run_id
        await until(handle, lambda s: bool(s.approvals))
        if (await handle.describe()).run_id == first:
            await another(handle, first)
        async with asyncio.timeout(PATIENCE_S):
            while (there := (await handle.describe()).typed_search_attributes).get(STATUS) != Phase.WAITING_HUMAN:
                await asyncio.sleep(0.02)
        assert (there.get(AGENT), there.get(TENANT)) == (spec.name, "default")
        await handle.terminate()
