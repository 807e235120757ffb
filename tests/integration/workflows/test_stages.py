"""Stages: calls on task queues of their own, and turns that wait for a service instead of putting the call off."""

from __future__ import annotations

import asyncio
import uuid

import httpx2
import pytest
from temporalio.client import WorkflowHandle

from holdfast.authoring import registry
from holdfast.authoring.agent import BreakerRule, Service
from holdfast.authoring.tools import Tool, ToolContext, tool
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import Phase, RunOutcome
from holdfast.engine.worker import NotReady, chosen
from holdfast.testing.model import call, error, say, sequence, turn
from holdfast.testing.stage import Stage, cancelled, until
from tests.fixtures.world import World, agent
from workflows.serving import make_worker


async def queues(handle: WorkflowHandle) -> dict[str, str]:
    """The task queue of each activity of a run, by its summary; of an undo by `undo` and its summary."""
    found = {}
    async for event in handle.fetch_history_events():
        if event.HasField("activity_task_scheduled_event_attributes"):
            scheduled = event.activity_task_scheduled_event_attributes
            undo = "undo " if scheduled.activity_type.name == "undo" else ""
            found[undo + event.user_metadata.summary.data.decode().strip('"')] = scheduled.task_queue.name
    return found


async def test_a_call_and_its_undo_run_on_their_stage_and_wait_for_its_workers(lite: Stage):
    world = World()
    spec = agent(world.tool("parse", queue="extract"), world.tool("keep"))
    lite.model.script = sequence(call(("parse", {})), call(("keep", {})), say("done"), say("done"))
    handle = await lite.start(spec)
    async with lite.worker():
        await until(handle, lambda status: status.line.endswith("Running parse"))
        assert world.log == []
        async with make_worker(lite.client, lite.queue, lite.runtime, "extract"):
            assert (await handle.result()).outcome is RunOutcome.COMPLETED
            assert world.log == ["begin parse#1", "done parse#1", "begin keep#2", "done keep#2"]
            told = await queues(handle)
            assert told["#1 parse (world)"] == f"{lite.queue}.extract"
            assert {queue for summary, queue in told.items() if "parse" not in summary} == {lite.queue}
            stopped = await lite.start(agent(world.tool("place", queue="extract"), world.tool("ask", approval=True)))
            lite.model.script = sequence(call(("place", {})), call(("ask", {})))
            await until(stopped, lambda status: bool(status.approvals))
            await stopped.cancel()
            await cancelled(stopped)
            assert (await queues(stopped))["undo #1 place (world)"] == f"{lite.queue}.extract"
            assert world.log[-1] == "undo place#1"


def test_a_worker_serves_what_it_is_told_and_an_unknown_stage_is_refused():
    stage = f"s{uuid.uuid4().hex[:8]}"
    agent(World().tool("parse", queue=stage))
    assert stage in registry.stages()
    assert chosen(None) == ["", *registry.stages()]
    assert chosen("main") == [""]
    assert chosen(stage) == [stage]
    with pytest.raises(NotReady, match=rf"--queue extrakt: .*main, .*{stage}"):
        chosen("extrakt")


@pytest.mark.parametrize("queue", ["main", "Extract", "a.b", " "])
def test_a_stage_is_a_word_and_not_the_main_queue(queue: str):
    with pytest.raises(TypeError, match="queue"):
        World().tool("parse", queue=queue)


def patient(service: str, up: asyncio.Event) -> tuple[Tool, list[str]]:
    """A tool that is not put off, whose service fails until it is up."""
    log: list[str] = []

    @tool(effect=Effect.IDEMPOTENT, service=service, deferrable=False, retries=9)
    async def work(ctx: ToolContext) -> str:
        """Works."""
        log.append(ctx.key)
        if not up.is_set():
            raise httpx2.ConnectError("gone")
        return "worked"

    return work, log


async def test_a_turn_waits_for_a_service_when_its_call_is_not_put_off(lite: Stage):
    name = f"svc-{uuid.uuid4().hex[:8]}"
    work, log = patient(name, up := asyncio.Event())
    spec = agent(work, services=(Service(name, breaker=BreakerRule(failures=1, probe_after_s=3)),))
    lite.model.script = sequence(call(("work", {})), say("done"))
    async with lite.worker():
        handle = await lite.start(spec)
        parked = await until(handle, lambda status: status.phase is Phase.PARKED)
        assert name in parked.line
        up.set()
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
    assert len(log) >= 2
    assert len(set(log)) == 1
    assert [turn(messages) for _, messages in lite.model.requests] == [1, 2]  # none in between: nothing was put off


async def test_a_call_that_is_not_put_off_waits_for_its_model_as_a_turn_does(lite: Stage):
    @tool(effect=Effect.IDEMPOTENT, service="model", deferrable=False, retries=0)
    async def think(ctx: ToolContext) -> str:
        """Thinks."""
        return (await ctx.ask_model("thought", [{"role": "user", "content": "think"}])).text

    asked = 0

    def script(messages):
        nonlocal asked
        if messages[0]["content"] != "think":
            return call(("think", {})) if turn(messages) == 1 else say("done")
        asked += 1
        return error(401) if asked < 8 else say("thought")

    lite.model.script = script
    async with lite.worker():
        result = await (await lite.start(agent(think))).result()
    assert (result.outcome, result.failures, asked) == (RunOutcome.COMPLETED, 0, 8)
