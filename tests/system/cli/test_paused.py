"""What Temporal has paused, a run or an activity, what fails and what was terminated: every command says so.

The status of a paused run is one that Temporal's Python SDK does not know.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio import workflow
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from holdfast.contracts.run import RunOutcome, RunResult
from holdfast.dev.stack import without_ours
from holdfast.engine.client import DATA_CONVERTER
from holdfast.engine.executions import PAUSED_ACTIVITY, describe
from holdfast.recovery.model import unwind_id
from holdfast.recovery.orphans import find_orphans
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, a_stage, cancelled, dev_server, until
from tests.fixtures.stack import Cli
from tests.fixtures.temporal import temporal_cli
from tests.fixtures.world import World, agent
from tests.integration.workflows.test_orphans import sweep, waiting_run


@workflow.defn(name="AgentWorkflow")
class Broken:
    @workflow.run
    async def run(self, given: Any) -> None:
        raise ValueError("the prompt table is gone")


@dataclass
class PausableServer:
    """A server on which runs can be paused, a worker, and the command line against both."""

    stage: Stage
    cli: Cli

    async def run(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = await asyncio.to_thread(self.cli, *arguments)
        assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    async def parsed(self, *arguments: str) -> Any:
        return json.loads((await self.run(*arguments, "--json")).stdout)

    async def temporal(self, *arguments: str) -> None:
        done = await temporal_cli(self.stage, *arguments)
        assert done.returncode == 0, done.stderr

    async def pause(self, handle: WorkflowHandle[Any, Any]) -> None:
        await self.temporal("workflow", "pause", "-w", handle.id, "--reason", "lunch")

    async def unpause(self, handle: WorkflowHandle[Any, Any]) -> None:
        await self.temporal("workflow", "unpause", "-w", handle.id)

    async def paused_run(self, world: World) -> WorkflowHandle[Any, RunResult]:
        """A run that has booked, waits for the approval `a2`, and is paused."""
        handle = await waiting_run(self.stage, world)
        await self.pause(handle)
        return handle


@pytest_asyncio.fixture
async def pausable(sqlite_url: str, tmp_path: Path) -> AsyncIterator[PausableServer]:
    env = await dev_server({"frontend.WorkflowPauseEnabled": "true"}, data_converter=DATA_CONVERTER)
    async with env, a_stage(env.client, sqlite_url) as stage, stage.worker():
        environment = {
            **without_ours(os.environ),
            "TEMPORAL_ADDRESS": env.client.service_client.config.target_host,
            "HOLDFAST_DATABASE_URL": sqlite_url,
            "HOLDFAST_TASK_QUEUE": stage.queue,
            "HOLDFAST_HOME": str(tmp_path),
        }
        yield PausableServer(stage, Cli(environment))


async def test_looking_at_a_paused_run_says_so_and_how_to_let_it_go_on(pausable: PausableServer) -> None:
    handle = await pausable.paused_run(World())
    (listed,) = [each for each in await pausable.parsed("list") if each["workflow_id"] == handle.id]
    assert (listed["status"], listed["running"]) == ("paused", True)
    assert listed["note"] == ""
    status = await pausable.parsed("status", handle.id)
    assert status["temporal"] == "paused"
    how = "(lunch): the run does nothing, and keeps the Signals that come, until you run "
    how += f"`temporal workflow unpause --workflow-id {handle.id}`"
    assert how in status["note"]
    assert how in (await pausable.run("status", handle.id)).stderr
    assert how in (await pausable.run("approvals")).stderr
    assert how in (await pausable.run("approvals", handle.id)).stderr
    assert how in (await pausable.run("result", handle.id, status=2)).stderr
    assert (await pausable.run("orphans")).returncode == 0
    assert (await pausable.run("dlq", "list")).returncode == 0
    assert "Traceback" not in (await asyncio.to_thread(pausable.cli, "doctor")).stderr


async def test_what_is_said_to_a_paused_run_is_kept_until_it_goes_on(pausable: PausableServer) -> None:
    world = World()
    handle = await pausable.paused_run(world)
    refusals = (
        ["approve", handle.id],
        ["reject", handle.id, "--reason", "no"],
        ["edit", handle.id, "--set", "n=2"],
        ["settle", handle.id, "book", "--happened"],
    )
    for command in refusals:
        said = (await pausable.run(*command, status=2)).stderr
        assert "temporal workflow unpause" in said, said
    (sent,) = await pausable.parsed("approve", handle.id, "a2", "--by", "dr.lee")
    assert (sent["accepted"], sent["sent_as"]) == (True, "signal")
    assert "paused" in sent["message"]
    assert (await pausable.parsed("message", handle.id, "hurry"))["sent_as"] == "signal"
    assert (await pausable.parsed("answer", handle.id, "q9", "yes"))["sent_as"] == "signal"
    assert not any("send" in entry for entry in world.log)
    following = await asyncio.to_thread(pausable.cli.start, "follow", handle.id)
    assert following.stdout is not None
    assert "temporal workflow unpause" in await asyncio.to_thread(following.stdout.readline)
    await pausable.unpause(handle)
    assert (await handle.result()).outcome is RunOutcome.COMPLETED
    said, _ = await asyncio.to_thread(following.communicate, timeout=PATIENCE_S)
    assert following.returncode == 0, said
    assert world.log == ["begin book#1", "done book#1", "begin send#2", "done send#2"]


async def test_a_paused_run_that_is_cancelled_undoes_what_it_did_when_it_goes_on(pausable: PausableServer) -> None:
    world = World()
    handle = await pausable.paused_run(world)
    assert "temporal workflow unpause" in (await pausable.run("cancel", handle.id)).stdout
    await pausable.unpause(handle)
    await cancelled(handle)
    assert world.log == ["begin book#1", "done book#1", "undo book#1"]


async def test_waiting_for_a_paused_run_says_that_it_is_paused(pausable: PausableServer) -> None:
    start = ("run", "discharge", "--input", '{"patient_id": "pat-1"}', "--id", "k")
    elsewhere = Cli({**pausable.cli.environment, "HOLDFAST_TASK_QUEUE": "without-a-worker"})
    run = json.loads((await asyncio.to_thread(elsewhere, *start, "--json")).stdout)["workflow_id"]
    await pausable.pause(pausable.stage.client.get_workflow_handle(run))
    waiting = await asyncio.to_thread(elsewhere.start, *start, "--wait")
    assert waiting.stdout is not None
    try:
        said = [await asyncio.to_thread(waiting.stdout.readline) for _ in range(3)]
        assert "temporal workflow unpause" in said[2], said
    finally:
        waiting.kill()
        waiting.communicate()


async def test_a_terminated_run_says_what_it_left_and_who_undoes_it(pausable: PausableServer) -> None:
    handle = await waiting_run(pausable.stage, World())
    await handle.terminate("by hand")
    who = "the sweep undoes what it did within some minutes, `uv run starter.py orphans --fix` does it now"
    status = await pausable.parsed("status", handle.id)
    assert status["note"] == f"the run is terminated and recorded no end: {who}. Left, the newest first: book #1"
    assert status["note"] in (await pausable.run("follow", handle.id, status=2)).stderr
    async with asyncio.timeout(PATIENCE_S):
        while (listed := await pausable.parsed("list"))[0]["running"]:  # visibility is a little late
            await asyncio.sleep(0.2)
    assert (listed[0]["status"], listed[0]["note"]) == ("terminated", f"terminated; {who}")
    shown = await pausable.run("list")
    assert f"note: {handle.id}: terminated; {who}" in shown.stderr
    assert who not in shown.stdout
    (ended,) = await sweep(pausable.stage)
    assert ended.ok
    assert [(each["status"], each["note"]) for each in await pausable.parsed("list")] == [("cancelled", "")]
    assert (await pausable.parsed("status", handle.id))["note"] == ""


async def test_status_of_a_terminated_run_names_the_workflow_that_undoes_it(pausable: PausableServer) -> None:
    handle = await waiting_run(pausable.stage, World())
    await handle.terminate("by hand")
    (found,) = await find_orphans(pausable.stage.runtime.db, pausable.stage.client, 0.0)
    unwinding = await pausable.stage.client.start_workflow(
        "RepairWorkflow", found, id=unwind_id(found.key_base), task_queue="without-a-worker"
    )
    note = (await pausable.parsed("status", handle.id))["note"]
    assert note.endswith(f": the workflow {unwinding.id} undoes what it did. Left, the newest first: book #1")
    await unwinding.terminate("the test is over")


async def test_a_run_that_unwinds_is_compensating_and_says_what_is_still_to_be_undone(pausable: PausableServer) -> None:
    world = World()
    book = world.tool("book", undo=[ConnectionRefusedError("desk is down")] * 100, retries=100)
    pausable.stage.model.script = sequence(call(("book", {})), call(("send", {})), say("done"))
    handle = await pausable.stage.start(agent(book, world.tool("send", approval=True)))
    await until(handle, lambda s: bool(s.approvals))
    await pausable.run("cancel", handle.id)
    await until(handle, lambda s: s.phase == "compensating")
    shown = (await pausable.run("status", handle.id)).stdout
    assert "compensating" in shown
    assert "cancelled" not in shown.splitlines()[0]
    assert "to be undone" in shown
    async with asyncio.timeout(PATIENCE_S):
        while (await pausable.parsed("list"))[0]["status"] != "compensating":  # visibility is a little late
            await asyncio.sleep(0.2)
    await handle.terminate("the test is over")


async def test_a_run_whose_workflow_task_fails_says_why(pausable: PausableServer) -> None:
    """Its real reason, from the history: no worker is asked."""
    async with Worker(
        pausable.stage.client, task_queue="broken", workflows=[Broken], workflow_runner=UnsandboxedWorkflowRunner()
    ):
        handle = await pausable.stage.client.start_workflow(
            "AgentWorkflow", {"agent": "t"}, id=f"t-{pausable.stage.queue}", task_queue="broken"
        )
        async with asyncio.timeout(PATIENCE_S):
            while not (note := (await pausable.parsed("list"))[0]["note"]):
                await asyncio.sleep(0.5)
    assert note == "its workflow task fails and is tried again; `status` says why"
    for command in ("status", "approvals"):
        said = (await pausable.run(command, handle.id)).stderr
        assert "its workflow task fails and is tried again" in said
        assert "the prompt table is gone" in said
        assert "SDK bug" not in said
    await handle.terminate("the test is over")


async def test_a_hand_start_of_another_shape_ends_with_what_was_wrong(pausable: PausableServer) -> None:
    handle = await pausable.stage.client.start_workflow(
        "AgentWorkflow", args=[{"agent": "t"}, 2], id=f"t-{pausable.stage.queue}", task_queue=pausable.stage.queue
    )
    with pytest.raises(WorkflowFailureError) as caught:
        await handle.result()
    assert "exactly one input is taken" in str(caught.value.cause)


async def test_a_terminated_run_is_undone_while_another_is_paused(pausable: PausableServer) -> None:
    paused, gone = World(), World()
    handle = await pausable.paused_run(paused)
    terminated = await waiting_run(pausable.stage, gone)
    await terminated.terminate("by hand")
    (found,) = json.loads((await pausable.run("orphans", "--older-than", "0", "--json", status=1)).stdout)
    assert found["workflow_id"] == terminated.id
    (ended,) = await sweep(pausable.stage)
    assert ended.ok
    assert gone.log == ["begin book#1", "done book#1", "undo book#1"]
    assert paused.log == ["begin book#1", "done book#1"]
    await handle.terminate("paused, then terminated")
    (ended,) = await sweep(pausable.stage)
    assert ended.ok
    assert paused.log[-1] == "undo book#1"


async def test_an_activity_that_is_paused_is_said_with_the_command_that_lets_it_go_on(pausable: PausableServer) -> None:
    world = World()
    spec = agent(world.tool("book", errors=[ConnectionRefusedError("desk is down")] * 100, retries=100))
    pausable.stage.model.script = sequence(call(("book", {})), say("done"))
    handle = await pausable.stage.start(spec)
    async with asyncio.timeout(PATIENCE_S):
        while not (
            open_ones := [
                each
                for each in (await describe(pausable.stage.client, handle.id)).pending_activities
                if each.activity_type.name == "tool"
            ]
        ):
            await asyncio.sleep(0.02)
    await pausable.temporal("activity", "pause", "-w", handle.id, "-a", open_ones[0].activity_id, "--reason", "lunch")
    async with asyncio.timeout(PATIENCE_S):
        while (await describe(pausable.stage.client, handle.id)).pending_activities[0].state not in PAUSED_ACTIVITY:
            await asyncio.sleep(0.02)
    async with asyncio.timeout(PATIENCE_S):
        while not (note := (await pausable.parsed("list"))[0]["note"]):  # visibility is a little late
            await asyncio.sleep(0.2)
    assert note == "an activity of it is paused; `status` says which, and how it goes on"
    how = f"`temporal activity unpause --workflow-id {handle.id} --activity-id {open_ones[0].activity_id}`"
    assert how in (await pausable.run("status", handle.id)).stdout
    (in_flight,) = (await pausable.parsed("status", handle.id))["in_flight"]
    assert "(lunch)" in in_flight["paused"]
    following = await asyncio.to_thread(pausable.cli.start, "follow", handle.id)
    assert following.stdout is not None
    try:
        while how not in (line := await asyncio.to_thread(following.stdout.readline)):
            assert line, "follow ended"
    finally:
        following.kill()
        following.communicate()
    await until(handle, lambda s: s.phase == "running")
