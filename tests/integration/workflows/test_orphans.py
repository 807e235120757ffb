"""Runs that ended without a word: found by the sweep and undone once, while a run that lives is never touched."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from temporalio.client import Client, WorkflowHandle
from temporalio.service import RPCError

from holdfast.contracts.failures import ToolFailed
from holdfast.contracts.profile import Effect, StepSpec
from holdfast.contracts.recovery import RepairResult, Sweep, Swept
from holdfast.contracts.run import AgentInput, RunOutcome, RunResult, StepStatus
from holdfast.recovery.dead_letters import DeadLetters, LetterKind
from holdfast.recovery.model import unwind_id
from holdfast.recovery.orphans import find_orphans, is_over
from holdfast.reliability.ledger import State, tool_call
from holdfast.state.runs import Runs
from holdfast.testing.model import call, say, sequence
from holdfast.testing.stage import Stage, until
from tests.fixtures.world import World, agent
from tests.integration.workflows.test_reset import reset
from workflows.agent import AgentWorkflow

Unwinding = WorkflowHandle[Any, RepairResult]


async def begin_sweep(stage: Stage, grace_s: float = 0.0) -> list[Unwinding]:
    """Sweeps once; what it has started."""
    id = f"sweep-{uuid.uuid4().hex[:8]}"
    swept = await stage.client.execute_workflow(
        "OrphanSweep", Sweep(grace_s=grace_s), id=id, task_queue=stage.queue, result_type=Swept
    )
    return [stage.client.get_workflow_handle(each, result_type=RepairResult) for each in swept.found]


async def sweep(stage: Stage, grace_s: float = 0.0) -> list[RepairResult]:
    """Sweeps once and waits for what it has started."""
    return [await handle.result() for handle in await begin_sweep(stage, grace_s)]


async def waiting_run(stage: Stage, world: World, *tools: Any) -> WorkflowHandle[Any, RunResult]:
    """A run that has booked and now waits for an approval."""
    spec = agent(world.tool("book"), *tools, world.tool("send", approval=True))
    stage.model.script = sequence(
        call(("book", {})), *(call((each.name, {})) for each in tools), call(("send", {})), say("done")
    )
    handle = await stage.start(spec)
    await until(handle, lambda s: bool(s.approvals))
    return handle


async def test_a_terminated_run_is_undone_once_and_its_end_recorded(stage: Stage) -> None:
    world = World()
    async with stage.worker():
        handle = await waiting_run(stage, world)
        await handle.terminate("by hand")
        (ended,) = await sweep(stage)
        assert await sweep(stage) == []
    assert ended.ok
    assert world.log == ["begin book#1", "done book#1", "undo book#1"]
    result = await stage.stored(handle)
    assert (result.outcome, result.agent) == (RunOutcome.CANCELLED, handle.id.rpartition("-")[0])
    assert result.reason.startswith("terminated outside")
    assert [(u.tool, u.status) for u in result.undone] == [("book", "undone")]
    assert [s.status for s in result.steps] == [StepStatus.UNDONE, StepStatus.TODO]
    assert await DeadLetters(stage.runtime.db).find() == []


async def test_an_effect_in_flight_at_the_termination_is_undone_too(lite: Stage) -> None:
    """The activity of a terminated run goes on until its next heartbeat; its effect may still come to be."""
    world, gate = World(), asyncio.Event()
    spec = agent(world.tool("book", gate=gate))
    lite.model.script = sequence(call(("book", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        await world.saw("begin book#1")
        await handle.terminate("by hand")
        (ended,) = await sweep(lite)
        assert ended.ok
        row = await lite.runtime.ledger.entry(f"{(await lite.stored(handle)).key_base}/1")
        assert row is not None
        assert row.state is State.COMPENSATED
        gate.set()
        await world.saw("done book#1")
    assert world.log.count("undo book#1") == 1


async def test_a_live_run_is_never_touched(stage: Stage) -> None:
    """However long it waits for a person: its effect is older than any grace here."""
    world = World()
    async with stage.worker():
        handle = await waiting_run(stage, world)
        assert await sweep(stage) == []
        await handle.signal("decide", {"approval_id": "a2", "verdict": "approve", "approver": "dr.lee"})
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
        assert await sweep(stage) == []
    assert not any(entry.startswith("undo") for entry in world.log)


@pytest.mark.parametrize("how", ["continued as new", "reset"])
async def test_a_run_that_goes_on_under_another_run_id_lives(lite: Stage, how: str) -> None:
    world = World()
    spec = agent(world.tool("book"), world.tool("send", approval=True), turns_per_execution=1 if "new" in how else 100)
    lite.model.script = sequence(call(("book", {})), call(("send", {})), say("done"))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        if how == "reset":
            handle = await reset(lite, handle, 2)
            await until(handle, lambda s: bool(s.approvals))
        assert await sweep(lite) == []
        await handle.signal("decide", {"approval_id": "a2", "verdict": "approve", "approver": "dr.lee"})
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
    assert world.log == ["begin book#1", "done book#1", "begin send#2", "done send#2"]


async def test_a_terminated_run_that_was_reset_before_the_unwinding_began_is_left_alone(lite: Stage) -> None:
    world = World()
    async with lite.worker():
        handle = await waiting_run(lite, world)
        await handle.terminate("by mistake")
        (found,) = await find_orphans(lite.runtime.db, lite.client, 0.0)
        fresh = await reset(lite, handle, 2)
        await until(fresh, lambda s: bool(s.approvals))
        ended = await lite.client.execute_workflow(
            "RepairWorkflow", found, id=unwind_id(found.key_base), task_queue=lite.queue, result_type=RepairResult
        )
        assert "nothing was undone" in ended.words
        await fresh.signal("decide", {"approval_id": "a2", "verdict": "approve", "approver": "dr.lee"})
        assert (await fresh.result()).outcome is RunOutcome.COMPLETED
    assert not any(entry.startswith("undo") for entry in world.log)


async def test_a_young_effect_is_left_alone(lite: Stage) -> None:
    world = World()
    async with lite.worker():
        handle = await waiting_run(lite, world)
        await handle.terminate("by hand")
        assert await sweep(lite, grace_s=60) == []
    assert world.log[-1] == "done book#1"


@pytest.mark.parametrize("namespace", ["default", "another", None])
async def test_a_run_that_vanished_is_undone_if_it_was_started_in_this_namespace(
    stage: Stage, namespace: str | None
) -> None:
    """As when the server lost its data. What another namespace of the same store runs is none of ours."""
    world = World()
    spec = agent(world.tool("book"))
    base = f"{spec.name}-gone/0123456789ab"
    await Runs(stage.runtime.db).claim("k", f"{spec.name}-gone", spec.name, "d", namespace=namespace)
    reserved = tool_call(f"{base}/1", base, "book", Effect.IDEMPOTENT, {"n": 0}, seq=1, agent=spec.name)
    await stage.runtime.ledger.reserve(reserved)
    async with stage.worker():
        swept = await sweep(stage)
    row = await Runs(stage.runtime.db).by_workflow(f"{spec.name}-gone")
    assert row is not None
    if namespace == stage.client.namespace:
        assert [each.ok for each in swept] == [True]
        assert world.log == ["undo book#1"]
        assert (row.outcome, row.agent) == ("cancelled", spec.name)
    else:
        assert (swept, world.log, row.outcome) == ([], [], None)


async def test_another_run_of_the_same_id_is_not_taken_for_it(lite: Stage) -> None:
    world = World()
    async with lite.worker():
        first = await waiting_run(lite, world)
        await first.terminate("by hand")
        name = first.id.rpartition("-")[0]
        second = await lite.client.start_workflow(
            AgentWorkflow.run, AgentInput(agent=name), id=first.id, task_queue=lite.queue
        )
        await until(second, lambda s: bool(s.approvals))
        (ended,) = await sweep(lite)
        assert ended.ok
        assert world.log.count("undo book#1") == 1
        assert world.log.count("done book#1") == 2
        await second.signal("decide", {"approval_id": "a2", "verdict": "approve", "approver": "dr.lee"})
        assert (await second.result()).outcome is RunOutcome.COMPLETED
    assert world.log.count("undo book#1") == 1


async def test_a_doubtful_call_that_cannot_be_undone_is_asked_about_or_left_to_a_person(stage: Stage) -> None:
    world = World()
    never = asyncio.Event()
    mail = world.tool("mail", Effect.MANUAL, gate=never, undo=None, timeout=60)
    ping = world.tool("ping", Effect.PROBE, gate=never, undo=None, timeout=1, settles_within=4)

    @ping.probe
    async def asked(ctx: Any, n: int) -> str | None:
        world.log.append("asked ping")
        return None

    spec = agent(mail, ping)
    stage.model.script = sequence(call(("mail", {}), ("ping", {})))
    async with stage.worker():
        handle = await stage.start(spec)
        await world.saw("begin mail#1")
        await world.saw("begin ping#2")
        await handle.terminate("by hand")
        (ended,) = await sweep(stage)
        (letter,) = await DeadLetters(stage.runtime.db).find()
        assert (ended.ok, letter.kind, letter.subject) == (False, LetterKind.CALL, "mail")
        assert world.log.count("asked ping") > 1, "its no counts only when the service cannot be at work any more"
        base = (await stage.stored(handle)).key_base
        rows = {row.key: row.state for row in await stage.runtime.ledger.entries(base) if row.effect != "read"}
        assert rows == {f"{base}/1": State.RESERVED, f"{base}/2": State.FAILED}
        never.set()
        await world.saw("done mail#1")


async def test_a_compensation_of_a_terminated_run_that_fails_is_a_letter(lite: Stage) -> None:
    world = World()
    spec = agent(
        world.tool("book", undo=[ToolFailed("desk is closed")]),
        world.tool("tell", undo=None),
        world.tool("order"),
        world.tool("send", approval=True),
        steps=[StepSpec(name="visit", tools=["book"])],
    )
    calls = call(("book", {})), call(("tell", {})), call(("order", {})), call(("send", {}))
    lite.model.script = sequence(*calls, say("done"))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        await handle.terminate("by hand")
        (ended,) = await sweep(lite)
        (letter,) = await DeadLetters(lite.runtime.db).find()
        result = await lite.stored(handle)
    assert [(str(each), each.why) for each in result.stands] == [
        ("book #1", "its undo failed"),
        ("tell #2", "it has no undo"),
    ]
    assert (ended.ok, letter.kind, letter.key) == (False, LetterKind.UNDO, f"{letter.key_base}/1/undo")
    assert "desk is closed" in letter.cause


async def test_an_unwinding_that_was_itself_terminated_is_finished_by_the_next_sweep(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book", undo=[ConnectionRefusedError("desk is down")]), world.tool("send", approval=True))
    lite.model.script = sequence(call(("book", {})), call(("send", {})), say("done"))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        await handle.terminate("by hand")
        (unwinding,) = await begin_sweep(lite)
        await world.saw("undo of book#1 fails")
        await unwinding.terminate("by hand, too")
        (ended,) = await sweep(lite)
    assert ended.ok
    assert world.log.count("undo book#1") == 1
    assert (await lite.stored(handle)).outcome is RunOutcome.CANCELLED


async def test_a_completed_run_whose_record_is_lost_is_not_undone(lite: Stage) -> None:
    world = World()
    lite.model.script = sequence(call(("book", {})), say("done"))
    async with lite.worker():
        handle = await lite.start(agent(world.tool("book")))
        await handle.result()
        await lite.runtime.db.run("UPDATE runs SET ended_at = NULL")
        assert await sweep(lite) == []
    assert world.log == ["begin book#1", "done book#1"]


async def test_a_server_that_does_not_know_its_namespace_yet_makes_no_run_an_orphan(lite: Stage) -> None:
    """It says "not found" of every run for a moment after it has started."""
    config = lite.client.config() | {"namespace": f"not-yet-{uuid.uuid4().hex[:8]}"}
    with pytest.raises(RPCError, match="Namespace"):
        await is_over(Client(**config), "discharge-1", "discharge-1/0123456789ab")  # pyright: ignore
    assert await is_over(lite.client, "discharge-1", "discharge-1/0123456789ab")
