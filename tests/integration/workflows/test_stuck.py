"""Runs whose history does not replay: the sweep resets them and says so, and after two resets a person is asked."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from temporalio import workflow
from temporalio.client import WorkflowHandle, WorkflowHistory
from temporalio.worker import UnsandboxedWorkflowRunner

from activities.resets import replays_with
from holdfast.contracts.recovery import Sweep, Swept
from holdfast.contracts.run import RunOutcome, RunResult
from holdfast.contracts.tool_call import Outcome
from holdfast.engine.executions import PROBLEMS, describe
from holdfast.engine.starting import BadRequest
from holdfast.recovery.dead_letters import DeadLetters, LetterKind, LetterState
from holdfast.recovery.requests import repair_of
from holdfast.recovery.resets import SIGNAL, WasReset, find_stuck, mend
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, cancelled, until
from tests.fixtures.world import World, agent
from tests.integration.workflows.test_reset import reset
from workflows.agent import AgentWorkflow
from workflows.serving import WORKFLOWS
from workflows.state import CallState


@workflow.defn(name="AgentWorkflow")
class Elsewise(AgentWorkflow):
    """The workflow as another build might have it: it sleeps before each call but the first one."""

    @workflow.init
    def __init__(self, *payload: Any) -> None:
        super().__init__(*payload)

    @workflow.run
    async def run(self, *payload: Any) -> RunResult:
        return await super().run(*payload)

    async def _act(self, item: CallState) -> Outcome:
        if item.seq > 1:
            await asyncio.sleep(0.01)
        return await super()._act(item)


@workflow.defn(name="AgentWorkflow")
class AtTheEnd(AgentWorkflow):
    """It sleeps before the third call only, so its history breaks where a person has been asked already."""

    @workflow.init
    def __init__(self, *payload: Any) -> None:
        super().__init__(*payload)

    @workflow.run
    async def run(self, *payload: Any) -> RunResult:
        return await super().run(*payload)

    async def _act(self, item: CallState) -> Outcome:
        if item.seq > 2:
            await asyncio.sleep(0.01)
        return await super()._act(item)


def build(kind: type) -> dict[str, Any]:
    return {"workflows": [kind, *WORKFLOWS[1:]], "workflow_runner": UnsandboxedWorkflowRunner()}


ELSEWISE = build(Elsewise)


async def until_stuck(stage: Stage, handle: WorkflowHandle[Any, Any]) -> None:
    """Waits until its workflow task has failed as often as the server has to see before it reports the run."""
    async with asyncio.timeout(PATIENCE_S):
        while PROBLEMS not in (now := await describe(stage.client, handle.id)).attributes:
            await asyncio.sleep(0.05)
    stage.broken.add(now.run_id)


async def begin(stage: Stage, world: World, *more: Any, kind: type = Elsewise) -> WorkflowHandle[Any, RunResult]:
    """A run of three calls that waits for the approval `a3`, with a history that our own code does not replay.

    more: Updates that approve it.
    """
    spec = agent(world.tool("book"), world.tool("order"), world.tool("send", approval=True))
    stage.model.script = sequence(call(("book", {})), call(("order", {})), call(("send", {})), say("done"))
    stage.task_timeout = timedelta(seconds=2)
    async with stage.worker(**build(kind)):
        handle = await stage.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        for name, payload in more:
            await handle.execute_update(name, payload)
    return stage.client.get_workflow_handle(handle.id, result_type=RunResult)


async def swept(stage: Stage) -> list[str]:
    """Sweeps until a run was found stuck: visibility knows of it a little later than the run itself."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            done = await stage.client.execute_workflow(
                "OrphanSweep",
                Sweep(grace_s=0.0),
                id=f"sweep-{uuid.uuid4().hex[:8]}",
                task_queue=stage.queue,
                result_type=Swept,
            )
            if done.stuck:
                return done.stuck
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("how", ["signal", "update", "both"])
async def test_a_run_that_does_not_replay_is_reset_and_ends_with_each_effect_once(stage: Stage, how: str) -> None:
    """What a person has decided before the reset counts; recorded turns and calls are not made again.

    both: what the run has accepted counts, and not what it has refused or what came after.
    """
    world = World()
    yes = {"approval_id": "a3", "verdict": "approve", "approver": "dr.lee"}
    no = {"approval_id": "a3", "verdict": "reject", "approver": "dr.no", "comment": "no"}
    updates = {"update": [("decide", yes)], "both": [("decide", yes), ("decide", no)]}
    handle = await begin(stage, world, *updates.get(how, []))
    if how != "update":
        await handle.signal("decide", yes if how == "signal" else no)
    async with stage.worker():
        await until_stuck(stage, handle)
        (line,) = await swept(stage)
        assert line.startswith(f"{handle.id}: reset to event ")
        async with asyncio.timeout(PATIENCE_S):
            result = await handle.result()
        assert await find_stuck(stage.client) == []
    assert result.outcome is RunOutcome.COMPLETED
    assert any("the sweep has reset the run" in note for note in result.notes)
    assert [d.decision.approver for d in result.decisions] == ["dr.lee"]
    done = sorted(entry for entry in world.log if entry.startswith("done"))
    assert done == ["done book#1", "done order#2", "done send#3"]
    turns = Counter(key for key, _ in stage.model.requests)
    assert (len(turns), [*turns.values()][:3]) == (4, [1, 1, 1]), "a turn that was recorded was paid again"
    assert await DeadLetters(stage.runtime.db).find() == []


async def test_what_the_run_had_accepted_counts_also_when_its_request_is_open_at_the_reset(lite: Stage) -> None:
    world = World()
    yes = {"approval_id": "a3", "verdict": "approve", "approver": "dr.lee"}
    handle = await begin(lite, world, ("decide", yes), kind=AtTheEnd)
    await handle.signal("decide", {**yes, "verdict": "reject", "approver": "dr.no", "comment": "no"})
    async with lite.worker():
        await until_stuck(lite, handle)
        await swept(lite)
        result = await handle.result()
    assert (result.outcome, [d.decision.approver for d in result.decisions]) == (RunOutcome.COMPLETED, ["dr.lee"])


async def test_a_stuck_run_that_was_cancelled_undoes_everything_after_its_reset(lite: Stage) -> None:
    world = World()
    handle = await begin(lite, world)
    await handle.cancel()
    async with lite.worker():
        await until_stuck(lite, handle)
        await swept(lite)
        await cancelled(handle)
    assert [entry for entry in world.log if entry.startswith("undo")] == ["undo order#2", "undo book#1"]


async def test_a_crash_between_the_reset_and_the_repeated_cancel_loses_no_cancel(
    lite: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing outside can kill the sweep's worker at that very moment, so its first cancel raises instead."""
    world = World()
    handle = await begin(lite, world)
    await handle.cancel(reason="the patient has left")
    really, crashed = WorkflowHandle.cancel, list[str]()

    async def cancel(self: WorkflowHandle[Any, Any], **more: Any) -> None:
        if not crashed:
            crashed.append(self.id)
            raise ConnectionError("the worker is gone")
        await really(self, **more)

    monkeypatch.setattr(WorkflowHandle, "cancel", cancel)
    async with lite.worker():
        await until_stuck(lite, handle)
        (line,) = await swept(lite)
        assert line.startswith(f"{handle.id}: reset to event ")
        await cancelled(handle)
    assert crashed == [handle.id]
    assert [entry for entry in world.log if entry.startswith("undo")] == ["undo order#2", "undo book#1"]
    result = await lite.stored(handle)
    assert result.reason == "cancelled: the patient has left"
    assert len([note for note in result.notes if "the sweep has reset the run" in note]) == 1


async def test_a_cancel_that_comes_while_the_reset_is_prepared_is_not_lost(lite: Stage) -> None:
    world = World()
    handle = await begin(lite, world)
    await handle.signal("message", {"text": "hurry", "by": "dr.lee"})  # a workflow task, which fails
    replays = replays_with(lite.client, WORKFLOWS)

    async def late(history: WorkflowHistory) -> bool:
        await handle.cancel()
        return await replays(history)

    async with lite.worker():
        await until_stuck(lite, handle)
        stuck = await describe(lite.client, handle.id)
        async with asyncio.timeout(PATIENCE_S):
            mended = await mend(lite.client, stuck, late)
        assert mended.words.startswith("reset to event ")
        await cancelled(handle)
        # Again, as after a crash: the run has ended by now.
        assert await mend(lite.client, stuck, replays) == mended
    assert [entry for entry in world.log if entry.startswith("undo")] == ["undo order#2", "undo book#1"]


async def test_after_two_resets_a_person_is_asked_and_there_is_no_third(lite: Stage) -> None:
    """The resets are counted in the run's history, and what counts them comes along with each of them."""
    world = World()
    handle = await begin(lite, world)
    for number in (1, 2):
        await handle.signal(SIGNAL, WasReset(run_id=f"an-earlier-one-{number}", number=number, event_id=7))
    async with lite.worker():
        await until_stuck(lite, handle)
        (line,) = await swept(lite)
        assert line == f"{handle.id}: its history does not replay, after 2 resets by the sweep"
        before = (await describe(lite.client, handle.id)).run_id
        await swept(lite)
        assert (await describe(lite.client, handle.id)).run_id == before
        (letter,) = await DeadLetters(lite.runtime.db).find()
        assert (letter.kind, letter.state, letter.workflow_id) == (LetterKind.STUCK, LetterState.OPEN, handle.id)
        assert letter.details["commands"][0].startswith("temporal workflow reset --workflow-id ")
        assert "--reapply-exclude Update" in letter.details["commands"][0]
        with pytest.raises(BadRequest, match="dlq show"):
            await repair_of(letter, lite.runtime.db, "dr.lee")
        fresh = await reset(lite, handle, 1)
        await until(fresh, lambda s: bool(s.approvals))
        await handle.signal("decide", {"approval_id": "a3", "verdict": "approve", "approver": "dr.lee"})
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
        (letter,) = await DeadLetters(lite.runtime.db).find()
        assert letter.closed_at is not None


async def test_a_run_that_replays_is_left_alone(lite: Stage) -> None:
    """A worker of another build fails at it; resetting it would help nobody."""
    world = World()
    handle = await begin(lite, world)

    async def replays(history: WorkflowHistory) -> bool:
        return True

    mended = await mend(lite.client, await describe(lite.client, handle.id), replays)
    assert (mended.given_up, "another build" in mended.words) == (False, True)
    assert (await handle.fetch_history()).events[-1].event_id == (await describe(lite.client, handle.id)).version[1]
    async with lite.worker(**ELSEWISE):
        await handle.signal("decide", {"approval_id": "a3", "verdict": "approve", "approver": "dr.lee"})
        await handle.result()
    lite.broken.add((await describe(lite.client, handle.id)).run_id)
