"""Reset of a run whose effects were undone meanwhile: it never builds on what no longer stands."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from temporalio.client import WorkflowHandle

from holdfast.authoring.tools import Tool
from holdfast.contracts.failures import ToolFailed
from holdfast.contracts.profile import Effect
from holdfast.contracts.recovery import Action, Repair
from holdfast.contracts.run import RunOutcome, RunResult, RunStatus, StepStatus
from holdfast.contracts.tool_call import UndoStatus
from holdfast.reliability.ledger import State
from holdfast.testing.model import Message, call, say
from holdfast.testing.stage import Stage, cancelled, until
from tests.fixtures.temporal import temporal_cli
from tests.fixtures.world import World, agent
from tests.integration.workflows.test_orphans import sweep


def model(*names: str) -> Any:
    """Does what is not done, in this order, as far as it was told; then it ends."""

    def script(messages: list[Message]) -> Message:
        done: list[str] = []
        asked = ""
        for message in messages:
            text = str(message.get("content"))
            if calls := message.get("tool_calls"):
                asked = calls[0]["function"]["name"]
            elif message.get("role") == "tool" and "not done" not in text:
                done.append(asked)
            if "no longer standing" in text:
                done = [name for name in done if f" {name}" not in text.partition("no longer standing")[2]]
            if "it did not happen" in text:
                done = [name for name in done if f" of {name}:" not in text]
        left = [name for name in names or ("book", "send") if name not in done]
        return call((left[0], {})) if left else say("ended")

    return script


async def reset(stage: Stage, handle: WorkflowHandle[Any, Any], completed_task: int) -> WorkflowHandle[Any, RunResult]:
    """`temporal workflow reset` to the n-th completed workflow task (from 1); the handle of the newest execution."""
    tasks = [e for e in (await handle.fetch_history()).events if e.HasField("workflow_task_completed_event_attributes")]
    event = str(tasks[completed_task - 1].event_id)
    where = ("--workflow-id", handle.id, "--run-id", handle.result_run_id or "", "--event-id", event)
    told = await temporal_cli(stage, "workflow", "reset", *where, "--reason", "test")
    assert told.returncode == 0, told.stderr
    return stage.client.get_workflow_handle(handle.id, result_type=RunResult)


async def waits_at_send(stage: Stage, world: World, book: Tool | None = None) -> tuple[Any, int]:
    """A run that has booked and waits for the approval of its message; how many tasks it has completed by then."""
    spec = agent(book or world.tool("book"), world.tool("send", approval=True))
    stage.model.script = model()
    handle = await stage.start(spec)
    await until(handle, lambda s: bool(s.approvals))
    events = (await handle.fetch_history()).events
    return handle, sum(e.HasField("workflow_task_completed_event_attributes") for e in events)


async def approves(handle: Any, stands: str) -> RunResult:
    """Approves each message that is asked for, once `stands` is in the world's log and the run asks anew."""

    def asks(now: RunStatus) -> bool:
        return any(a.id != "a2" for a in now.approvals)

    now = await until(handle, asks)
    await handle.signal("decide", {"approval_id": now.approvals[0].id, "verdict": "approve", "approver": "dr.lee"})
    return await handle.result()


def standing(world: World, name: str) -> list[str]:
    """The calls of a tool whose effects stand, by the world's own log."""
    up: list[str] = []
    for entry in world.log:
        what, _, label = entry.rpartition(" ")
        if label.startswith(f"{name}#"):
            if what == "done":
                up.append(label)
            elif what == "undo" and label in up:
                up.remove(label)
    return up


@pytest.mark.parametrize("uncached", [False, True], ids=["cached", "uncached"])
async def test_cancelled_and_undone(stage: Stage, uncached: bool) -> None:
    world = World()
    options: dict[str, Any] = {"max_cached_workflows": 0} if uncached else {}
    async with stage.worker(**options):
        handle, tasks = await waits_at_send(stage, world)
        await handle.cancel()
        await cancelled(handle)
        assert standing(world, "book") == []
        fresh = await reset(stage, handle, tasks)
        result = await approves(fresh, "book")
    assert result.outcome is RunOutcome.COMPLETED
    assert len(standing(world, "book")) == len(standing(world, "send")) == 1
    assert standing(world, "book") != ["book#1"], "done again under a new key"
    assert world.log.count("undo book#1") == 1
    assert any("no longer standing: #1 book" in note for note in result.notes)


async def test_to_its_very_beginning(lite: Stage) -> None:
    """No call is believed done then: what was undone is done under keys that nothing has used."""
    world = World()
    async with lite.worker():
        handle, _ = await waits_at_send(lite, world)
        await handle.cancel()
        await cancelled(handle)
        result = await approves(await reset(lite, handle, 1), "book")
    assert result.outcome is RunOutcome.COMPLETED
    assert len(standing(world, "book")) == len(standing(world, "send")) == 1


async def test_terminated_and_swept(stage: Stage) -> None:
    world = World()
    async with stage.worker():
        handle, tasks = await waits_at_send(stage, world)
        await handle.terminate("by hand")
        assert [each.ok for each in await sweep(stage)] == [True]
        assert standing(world, "book") == []
        result = await approves(await reset(stage, handle, tasks), "book")
    assert result.outcome is RunOutcome.COMPLETED
    assert len(standing(world, "book")) == len(standing(world, "send")) == 1
    assert (await stage.stored(handle)).outcome is RunOutcome.COMPLETED


async def test_while_its_undo_is_under_way(stage: Stage) -> None:
    world, gate = World(), asyncio.Event()
    book = world.tool("book")

    async def slowly(ctx: Any, undo: Any) -> str:
        world.log.append("undo begins")
        await gate.wait()
        world.log.append("undo book#1")
        return "undone"

    book.undo(slowly)
    async with stage.worker():
        handle, tasks = await waits_at_send(stage, world, book)
        await handle.cancel()
        await world.saw("undo begins")
        fresh = await reset(stage, handle, tasks)
        async with asyncio.timeout(60):
            while world.log.count("undo begins") < 2:  # the run finishes the undo itself
                await asyncio.sleep(0.02)
        assert not any(entry.startswith("begin send") for entry in world.log)
        gate.set()
        result = await approves(fresh, "book")
    assert result.outcome is RunOutcome.COMPLETED
    assert standing(world, "book") != ["book#1"]
    assert len(standing(world, "book")) == 1


async def test_an_undo_that_comes_after_the_reset_does_not_act(stage: Stage) -> None:
    """As of a sweep that had looked before: it finds the run alive once it holds its reservation."""
    world = World()
    async with stage.worker():
        handle, tasks = await waits_at_send(stage, world)
        await handle.terminate("by hand")
        fresh = await reset(stage, handle, tasks)
        now = await until(fresh, lambda s: bool(s.approvals))
        action = Action(do="undo", key=f"{now.key_base}/1", seq=1, tool="book", arguments={"n": 0})
        repair = Repair(workflow_id=handle.id, key_base=now.key_base, agent=now.agent, actions=[action])
        late = await stage.client.start_workflow(
            "RepairWorkflow", repair, id=f"late-{handle.id}", task_queue=stage.queue
        )
        await late.result()
        assert "undo book#1" not in world.log
        await fresh.signal("decide", {"approval_id": "a2", "verdict": "approve", "approver": "dr.lee"})
        result = await fresh.result()
        assert result.outcome is RunOutcome.COMPLETED
        late = await stage.client.start_workflow(
            "RepairWorkflow", repair, id=f"later-{handle.id}", task_queue=stage.queue
        )
        await late.result()
    assert standing(world, "book") == ["book#1"]


async def test_cancelled_again_after_it_undoes_what_it_did_anew(lite: Stage) -> None:
    world = World()
    async with lite.worker():
        handle, tasks = await waits_at_send(lite, world)
        await handle.cancel()
        await cancelled(handle)
        fresh = await reset(lite, handle, tasks)
        await until(fresh, lambda s: any(a.id != "a2" for a in s.approvals))
        assert len(standing(world, "book")) == 1
        await fresh.cancel()
        await cancelled(fresh)
    assert standing(world, "book") == []
    assert [u.status for u in (await lite.stored(handle)).undone] == ["undone"]


async def test_a_second_reset_looks_again(lite: Stage) -> None:
    world = World()
    async with lite.worker():
        handle, tasks = await waits_at_send(lite, world)
        await handle.cancel()
        await cancelled(handle)
        fresh = await reset(lite, handle, tasks)
        await until(fresh, lambda s: any(a.id != "a2" for a in s.approvals))
        events = (await fresh.fetch_history()).events
        later = sum(e.HasField("workflow_task_completed_event_attributes") for e in events)
        await fresh.cancel()
        await cancelled(fresh)
        before = (await until(fresh, lambda s: s.outcome is not None)).calls
        again = await reset(lite, fresh, later)
        now = await until(again, lambda s: any(int(a.id[1:]) > before for a in s.approvals))
        asked = next(a for a in now.approvals if int(a.id[1:]) > before)
        await again.signal("decide", {"approval_id": asked.id, "verdict": "approve", "approver": "dr.lee"})
        result = await again.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert len(standing(world, "book")) == len(standing(world, "send")) == 1


@pytest.mark.parametrize("verdict", ["happened", "did_not"])
async def test_an_undo_that_failed_half_way_goes_to_a_person(stage: Stage, verdict: str) -> None:
    """The undo may have acted before it failed, so only a person can say whether the effect stands."""
    world = World()
    book = world.tool("book", undo=[RuntimeError("a bug in the middle")])
    async with stage.worker():
        handle, tasks = await waits_at_send(stage, world, book)
        await handle.cancel()
        await cancelled(handle)
        before = await stage.stored(handle)
        assert [undo.status for undo in before.undone] == [UndoStatus.FAILED]
        row = await stage.runtime.ledger.entry(f"{before.key_base}/1/undo")
        assert row is not None
        assert row.state is State.UNKNOWN

        fresh = await reset(stage, handle, tasks)
        now = await until(fresh, lambda s: any(a.kind == "outcome" for a in s.approvals))
        (asked,) = [a for a in now.approvals if a.kind == "outcome"]
        assert (asked.id, asked.subject, asked.key) == ("o1", "book", f"{before.key_base}/1")
        assert "its undo began and did not succeed" in asked.why
        assert "a bug in the middle" in asked.why
        assert {step.name: step.status for step in now.steps}["book"] is StepStatus.PENDING
        await fresh.signal("decide", {"approval_id": "a2", "verdict": "approve", "approver": "dr.lee"})
        now = await until(fresh, lambda s: [a.id for a in s.approvals] == ["o1"])
        assert now.outcome is None
        await fresh.signal("decide", {"approval_id": "o1", "verdict": verdict, "approver": "ada"})
        result = await fresh.result()
        assert (result.outcome, result.pending) == (RunOutcome.COMPLETED, [])
        assert "Call #1 of book: outcome unknown" in str(stage.model.requests)
        booked = [entry for entry in world.log if entry.startswith("done book")]
        again = [] if verdict == "happened" else [f"done book#{result.calls}"]
        assert booked == ["done book#1", *again]
        # What the person has said holds for whoever asks the ledger later.
        rows = {e.key: e.state for e in await stage.runtime.ledger.entries(result.key_base)}
        assert rows[f"{result.key_base}/1"] is (State.DONE if verdict == "happened" else State.COMPENSATED)


async def test_what_stands_after_such_an_undo_is_undone_when_the_run_is_cancelled_again(lite: Stage) -> None:
    world = World()
    book = world.tool("book", undo=[RuntimeError("a bug in the middle")])
    async with lite.worker():
        handle, tasks = await waits_at_send(lite, world, book)
        await handle.cancel()
        await cancelled(handle)
        fresh = await reset(lite, handle, tasks)
        await until(fresh, lambda s: any(a.kind == "outcome" for a in s.approvals))
        await fresh.signal("decide", {"approval_id": "o1", "verdict": "happened", "approver": "ada"})
        await until(fresh, lambda s: [a.id for a in s.approvals] == ["a2"] and "settled by ada" in s.line)
        await fresh.cancel()
        await cancelled(fresh)
        result = await lite.stored(fresh)
    assert standing(world, "book") == []
    assert ([undo.status for undo in result.undone], result.stands) == ([UndoStatus.UNDONE], [])


async def test_a_message_that_was_sent_beyond_it_and_stands_is_not_sent_twice(lite: Stage) -> None:
    """It cannot be undone. The run booked, sent, and failed at the last step; the reset forgets that it sent."""
    world = World()
    spec = agent(
        world.tool("book"),
        world.tool("send", Effect.MANUAL, approval=True, undo=None),
        world.tool("file", errors=[ToolFailed("no")]),
    )
    lite.model.script = lambda messages: model("book", "send", "file")(messages)
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        events = (await handle.fetch_history()).events
        tasks = sum(e.HasField("workflow_task_completed_event_attributes") for e in events)
        await handle.signal("decide", {"approval_id": "a2", "verdict": "approve", "approver": "dr.lee"})
        with pytest.raises(Exception, match="Workflow execution failed"):
            await handle.result()
        assert (standing(world, "book"), standing(world, "send")) == ([], ["send#2"])
        result = await (await reset(lite, handle, tasks)).result()
    assert result.outcome is RunOutcome.COMPLETED
    assert standing(world, "send") == ["send#2"]
    assert len(standing(world, "book")) == 1
    assert standing(world, "book") != ["book#1"]
