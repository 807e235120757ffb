"""Cancelling a run: at any moment, effects in flight are settled, then what was done is undone, newest first."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from temporalio.client import WorkflowFailureError, WorkflowHandle

from holdfast.contracts.failures import ToolFailed, ToolRefused
from holdfast.contracts.profile import Effect, StepSpec
from holdfast.contracts.run import Phase, RunOutcome, UndoRecord
from holdfast.engine.webhooks import ENDED, run_is
from holdfast.reliability.ledger import State
from holdfast.testing.model import Message, call, error, say, sequence, turn
from holdfast.testing.stage import Stage, cancelled, status, until
from tests.fixtures.temporal import temporal_cli
from tests.fixtures.world import World, agent


def ends(undone: list[UndoRecord]) -> list[tuple[str, str]]:
    return [(f"{u.tool}#{u.seq}", u.status) for u in undone]


async def by_handle(stage: Stage, handle: WorkflowHandle[Any, Any]) -> None:
    await handle.cancel()


async def by_cli(stage: Stage, handle: WorkflowHandle[Any, Any]) -> None:
    done = await temporal_cli(stage, "workflow", "cancel", "--workflow-id", handle.id)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [{}, {"max_cached_workflows": 0}], ids=["cached", "uncached"])
@pytest.mark.parametrize("cancel", [by_handle, by_cli])
async def test_while_a_human_is_asked(lite: Stage, cancel: Any, options: dict[str, Any]) -> None:
    world = World()
    spec = agent(world.tool("book"), world.tool("order"), world.tool("send", approval=True))
    lite.model.script = sequence(call(("book", {}), ("order", {})), call(("send", {})))
    async with lite.worker(**options):
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        await cancel(lite, handle)
        await cancelled(handle)
        after = await status(handle)
    assert world.log[-2:] == ["undo order#2", "undo book#1"]
    assert not any("send" in entry for entry in world.log)
    assert (after.phase, after.outcome, after.approvals) == (Phase.ENDED, RunOutcome.CANCELLED, [])
    stored = await lite.stored(handle)
    assert (stored.outcome, ends(stored.undone)) == (
        RunOutcome.CANCELLED,
        [("book#1", "undone"), ("order#2", "undone")],
    )


async def test_an_effect_in_flight_is_settled_before_the_first_undo(lite: Stage) -> None:
    world, gate = World(), asyncio.Event()
    spec = agent(world.tool("book"), world.tool("slow", gate=gate))
    lite.model.script = sequence(call(("book", {})), call(("slow", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        await world.saw("begin slow#2")
        await handle.cancel()
        asyncio.get_running_loop().call_later(1.5, gate.set)  # past the next heartbeats, which tell of the cancel
        await cancelled(handle)
    assert world.log[-4:] == ["begin slow#2", "done slow#2", "undo slow#2", "undo book#1"]


async def test_an_effect_beside_an_approval_is_settled_before_the_first_undo(lite: Stage) -> None:
    world, gate = World(), asyncio.Event()
    spec = agent(world.tool("send", approval=True), world.tool("slow", gate=gate))
    lite.model.script = sequence(call(("send", {}), ("slow", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        await world.saw("begin slow#2")
        await until(handle, lambda s: bool(s.approvals))
        await handle.cancel()
        asyncio.get_running_loop().call_later(1.5, gate.set)
        await cancelled(handle)
    assert world.log == ["begin slow#2", "done slow#2", "undo slow#2"]


async def test_while_the_model_is_asked(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"))
    asked = asyncio.Event()
    answering = sequence(call(("book", {})), say("done"))

    def script(messages: list[Message]) -> Any:
        if turn(messages) == 2:
            asked.set()
            return error(503)
        return answering(messages)

    lite.model.script = script
    async with lite.worker():
        handle = await lite.start(spec)
        await asked.wait()
        await handle.cancel()
        await cancelled(handle)
    assert world.log == ["begin book#1", "done book#1", "undo book#1"]


async def test_between_the_retries_of_a_tool(lite: Stage) -> None:
    world = World()
    flaky = world.tool("flaky", errors=[ConnectionResetError("gone")] * 9, retries=9)
    spec = agent(world.tool("book"), flaky)
    lite.model.script = sequence(call(("book", {})), call(("flaky", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        await world.saw("begin flaky#2")
        await handle.cancel()
        await cancelled(handle)
    tries = world.log.count("begin flaky#2")
    assert world.log[-2:] == ["undo flaky#2", "undo book#1"], "whether it happened is not known, so it is undone"
    assert world.log.count("begin flaky#2") == tries <= 2


async def test_while_parked(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"))
    lite.model.script = lambda m: error(401) if turn(m) == 2 else call(("book", {}))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: s.phase is Phase.PARKED)
        await handle.cancel()
        await cancelled(handle)
    assert world.log[-1] == "undo book#1"
    assert (await lite.stored(handle)).outcome is RunOutcome.CANCELLED


async def test_before_the_first_step(lite: Stage) -> None:
    spec = agent(World().tool("book"))
    handle = await lite.start(spec)
    await handle.cancel()
    async with lite.worker():
        await cancelled(handle)
    assert (await lite.stored(handle)).outcome is RunOutcome.CANCELLED


async def test_again_while_unwinding_changes_nothing(lite: Stage) -> None:
    world, gate = World(), asyncio.Event()
    held = world.tool("held")

    async def slow_undo(ctx: Any, undo: Any) -> str:
        world.log.append("undo held begins")
        await gate.wait()
        world.log.append("undo held ends")
        return "ok"

    held.undo(slow_undo)
    spec = agent(world.tool("book"), held, world.tool("send", approval=True))
    lite.model.script = sequence(call(("book", {})), call(("held", {})), call(("send", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        await handle.cancel()
        await world.saw("undo held begins")
        await by_cli(lite, handle)
        await handle.cancel()
        gate.set()
        await cancelled(handle)
    assert world.log[-3:] == ["undo held begins", "undo held ends", "undo book#1"]
    assert ends((await lite.stored(handle)).undone) == [("book#1", "undone"), ("held#2", "undone")]


async def test_a_cancel_while_a_failed_run_unwinds_stops_no_undo(lite: Stage) -> None:
    world, gate = World(), asyncio.Event()
    held = world.tool("held")

    async def slow_undo(ctx: Any, undo: Any) -> str:
        world.log.append("undo held begins")
        await gate.wait()
        raise_once(world)
        world.log.append("undo held ends")
        return "ok"

    held.undo(slow_undo)
    spec = agent(world.tool("book"), held, world.tool("pay", errors=[ToolFailed("no")]))
    lite.model.script = sequence(call(("book", {})), call(("held", {})), call(("pay", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        await world.saw("undo held begins")
        await handle.cancel()
        gate.set()
        with pytest.raises(Exception, match="Workflow execution failed"):
            await handle.result()
    assert world.log[-2:] == ["undo held ends", "undo book#1"]
    stored = await lite.stored(handle)
    assert stored.outcome is RunOutcome.FAILED
    assert ends(stored.undone)[:2] == [("book#1", "undone"), ("held#2", "undone")]


def raise_once(world: World) -> None:
    if "undo held fails" not in world.log:
        world.log.append("undo held fails")
        raise ConnectionResetError("gone")


async def test_a_failing_undo_is_retried_then_recorded_and_the_others_go_on(lite: Stage) -> None:
    world = World()
    spec = agent(
        world.tool("book"),
        world.tool("flaky", undo=[ConnectionResetError("gone")]),
        world.tool("stuck", undo=[ToolFailed("the clinic is closed for good")]),
        world.tool("send", approval=True),
    )
    lite.model.script = sequence(call(("book", {})), call(("flaky", {})), call(("stuck", {})), call(("send", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        await handle.cancel()
        await cancelled(handle)
    assert world.log[6:] == ["undo of stuck#3 fails", "undo of flaky#2 fails", "undo flaky#2", "undo book#1"]
    undone = (await lite.stored(handle)).undone
    assert ends(undone) == [("book#1", "undone"), ("flaky#2", "undone"), ("stuck#3", "failed")]
    assert "the clinic is closed for good" in undone[2].note
    rows = {e.key.removeprefix(f"{(await lite.stored(handle)).key_base}/"): e for e in await entries(lite, handle)}
    assert rows["1"].state is rows["2"].state is State.COMPENSATED
    assert (rows["3"].state, rows["3/undo"].state) == (State.DONE, State.FAILED)


async def test_what_no_undo_takes_back_is_named_by_the_result_and_the_page(lite: Stage) -> None:
    world, steps = World(), [StepSpec(name="all", tools=["book", "tell"])]
    spec = agent(
        world.tool("book"),
        world.tool("tell", Effect.MANUAL, undo=None),
        world.tool("look", Effect.READ),
        world.tool("stuck", undo=[ToolFailed("the clinic is closed for good")]),
        world.tool("fails", undo=None, errors=[ToolFailed("no")]),
        world.tool("send", approval=True),
        steps=steps,
    )
    lite.model.script = sequence(
        call(("book", {}), ("look", {})), call(("tell", {}), ("stuck", {}), ("fails", {})), call(("send", {}))
    )
    async with lite.worker():
        handle = await lite.start(spec)
        asked = await until(handle, lambda s: bool(s.approvals))
        assert asked.stands == [], "while it goes on nothing has to be undone"
        await handle.cancel()
        await cancelled(handle)
        now = await status(handle)
        page = await handle.query("__temporal_workflow_metadata")
    result = await lite.stored(handle)
    stands = [(str(each), each.why) for each in result.stands]
    assert stands == [("tell #3", "it has no undo"), ("stuck #4", "its undo failed")]
    assert now.stands == result.stands
    assert now.line.endswith("Still stands: tell #3, stuck #4")
    assert "- tell #3: it has no undo" in page.current_details.replace("\\", "")
    data = run_is(ENDED, result, handle.id, "", "default", datetime.now(UTC)).data
    assert data["stands"] == [{"tool": "tell", "call": 3}, {"tool": "stuck", "call": 4}]


async def test_a_run_that_ends_well_leaves_nothing_that_stands(lite: Stage) -> None:
    lite.model.script = sequence(call(("tell", {})), say("told"))
    async with lite.worker():
        handle = await lite.start(agent(World().tool("tell", undo=None)))
        assert (await handle.result()).stands == []


async def entries(stage: Stage, handle: WorkflowHandle[Any, Any]) -> list[Any]:
    return await stage.runtime.ledger.entries((await stage.stored(handle)).key_base)


async def test_the_undo_of_an_unknown_effect_runs_and_knows_no_result(lite: Stage) -> None:
    world, never = World(), asyncio.Event()
    order = world.tool("order", Effect.MANUAL, gate=never, timeout=0.2)
    spec = agent(
        order,
        world.tool("send", approval=True),
        steps=[StepSpec(name="order", tools=["order"], critical=False), StepSpec(name="send", tools=["send"])],
    )
    lite.model.script = sequence(call(("order", {})), call(("send", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        await handle.cancel()
        await cancelled(handle)
    assert world.log == ["begin order#1", "undo order#1"]
    assert [u.note for u in (await lite.stored(handle)).undone] == ["order#1 undone, result was None"]


async def test_what_certainly_never_happened_has_nothing_to_undo(lite: Stage) -> None:
    """Neither a call that was refused, nor one that a human rejected, nor one that never began."""
    world = World()
    spec = agent(
        world.tool("order", errors=[ToolRefused("not today")]),
        world.tool("send", approval=True),
        world.tool("tell", approval=True),
    )
    lite.model.script = sequence(call(("order", {})), call(("send", {})), call(("tell", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: any(a.id == "a2" for a in s.approvals))
        await handle.signal("decide", {"approval_id": "a2", "verdict": "reject", "approver": "dr.lee", "comment": "no"})
        await until(handle, lambda s: any(a.id == "a3" for a in s.approvals))
        await handle.cancel()
        await cancelled(handle)
    assert world.log == ["begin order#1"]
    assert ends((await lite.stored(handle)).undone) == [("order#1", "nothing")]


async def test_a_call_that_no_worker_began_has_nothing_to_undo_and_cannot_begin_later(lite: Stage) -> None:
    """The worker has room for one: the other call is still in the queue when the run is cancelled."""
    world, gate = World(), asyncio.Event()
    spec = agent(world.tool("left", gate=gate), world.tool("right", gate=gate))
    lite.model.script = sequence(call(("left", {}), ("right", {})))
    async with lite.worker(max_concurrent_activities=1):
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(world.log))
        begun = world.log[0].removeprefix("begin ")
        await handle.cancel()
        asyncio.get_running_loop().call_later(1.0, gate.set)
        await cancelled(handle)
    assert world.log == [f"begin {begun}", f"done {begun}", f"undo {begun}"]
    undone = dict(ends((await lite.stored(handle)).undone))
    assert undone.pop(begun) == "undone"
    assert list(undone.values()) == ["nothing"]


async def test_a_cancel_while_a_deadline_waits_for_a_call_in_flight_loses_no_undo(lite: Stage) -> None:
    world, gate = World(), asyncio.Event()
    spec = agent(world.tool("book"), world.tool("slow", gate=gate), deadline=timedelta(seconds=2))
    lite.model.script = sequence(call(("book", {}), ("slow", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        await world.saw("begin slow#2")
        await until(handle, lambda s: s.outcome is RunOutcome.FAILED)
        await handle.cancel()
        gate.set()
        with pytest.raises(WorkflowFailureError):
            await handle.result()
    assert world.log[-3:] == ["done slow#2", "undo slow#2", "undo book#1"]
    assert (await lite.stored(handle)).outcome is RunOutcome.FAILED
