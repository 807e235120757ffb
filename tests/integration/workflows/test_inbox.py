"""What comes from outside is taken one at a time, so that its batches do not matter."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from temporalio.client import WorkflowHandle
from temporalio.worker import Replayer

from holdfast.contracts.data import Json
from holdfast.contracts.people import DecisionReply
from holdfast.contracts.run import RunOutcome
from holdfast.engine.client import sandbox
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, until
from tests.fixtures.world import World, agent
from tests.integration.workflows.evictions import ONE_POLL, Evictions, has
from tests.integration.workflows.plain import LINKS, Chained, book

HELLO: Json = {"text": "the family arrives at noon", "by": "nurse.kim"}
APPROVE: Json = {"verdict": "approve", "approver": "dr.lee"}


def approve(number: int) -> Json:
    return {**APPROVE, "approval_id": f"a{number}"}


@pytest.mark.parametrize("second", ["decide", "message"])
async def test_signals_in_two_portions_replay_in_one(lite: Stage, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    """A worker without the eviction of such runs (`holdfast.engine.ahead`): for Signals the inbox alone is enough."""
    evictions, world = Evictions(monkeypatch, evict=False), World()
    spec = agent(world.tool("send", approval=True))
    async with lite.worker(activities_only=True), asyncio.timeout(2 * PATIENCE_S):
        while not evictions.asked.is_set():
            lite.model.script = sequence(call(("send", {"n": 1}), ("send", {"n": 2})), say("ended"))
            async with lite.worker(**ONE_POLL):
                handle = await lite.start(spec)
                await until(handle, lambda s: len(s.approvals) == 2)
            query = asyncio.create_task(handle.query("status"))
            await handle.describe()  # the query is at the server by then
            await handle.signal("decide", approve(1))
            async with lite.worker(**ONE_POLL):
                asked = asyncio.create_task(evictions.asked.wait())
                await asyncio.wait([query, asked], return_when=asyncio.FIRST_COMPLETED)
                if second == "message":
                    await handle.signal("message", HELLO)
                update = asyncio.create_task(decided(handle, 2)) if second == "update" else None
                await (handle.describe() if update else handle.signal("decide", approve(2)))
                evictions.go_on.set()
                await query
                asked.cancel()
                assert update is None or (await update).accepted
                assert (await handle.result()).outcome is RunOutcome.COMPLETED
            await lite.replays()


async def test_all_that_follows_is_scheduled_before_the_next_is_taken(
    lite: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the end of a chain of conditions."""
    evictions = Evictions(monkeypatch, evict=False)
    workers: Json = {**ONE_POLL, "workflows": [Chained]}
    async with lite.worker(activities_only=True, activities=[book]), asyncio.timeout(2 * PATIENCE_S):
        while not evictions.asked.is_set():
            async with lite.worker(**workers):
                name = f"chained-{uuid.uuid4().hex[:8]}"
                handle = await lite.client.start_workflow(Chained.run, id=name, task_queue=lite.queue)
                await has(handle, "workflow_task_completed_event_attributes")
            query = asyncio.create_task(handle.query(Chained.told))
            await handle.describe()
            await handle.signal(Chained.tell, "first")
            async with lite.worker(**workers):
                asked = asyncio.create_task(evictions.asked.wait())
                await asyncio.wait([query, asked], return_when=asyncio.FIRST_COMPLETED)
                await handle.signal(Chained.tell, "second")
                evictions.go_on.set()
                await query
                asked.cancel()
                await handle.result()
            replayer = Replayer(
                workflows=[Chained], workflow_runner=sandbox(), data_converter=lite.client.data_converter
            )
            await replayer.replay_workflow(await handle.fetch_history())
    assert LINKS >= 6


@pytest.mark.parametrize("options", [{}, {"max_cached_workflows": 0}], ids=["cached", "uncached"])
async def test_many_at_once_are_taken_in_their_order(lite: Stage, options: Json) -> None:
    """Signals and Updates that wait for one workflow task."""
    world = World()
    spec = agent(world.tool("send", approval=True))
    lite.model.script = sequence(call(*(("send", {"n": n}) for n in (1, 2, 3))), say("ended"))
    async with lite.worker(activities_only=True):
        async with lite.worker(workflows_only=True, **options):
            handle = await lite.start(spec)
            await until(handle, lambda s: len(s.approvals) == 3)
        for number in (1, 1, 2):
            await handle.signal("decide", approve(number))
        await handle.signal("message", HELLO)
        updates = [asyncio.create_task(decided(handle, number)) for number in (2, 3)]
        async with lite.worker(workflows_only=True, **options):
            late, last = await asyncio.gather(*updates)
            result = await handle.result()
    assert (late.accepted, "a2 was already approved by dr.lee" in late.message) == (False, True)
    assert last.accepted
    assert [decision.approval.id for decision in result.decisions] == ["a1", "a2", "a3"]
    assert any("Message from nurse.kim" in note for note in result.notes)
    assert any("a1 was already approved by dr.lee" in note for note in result.notes)


async def decided(handle: WorkflowHandle[Any, Any], number: int) -> DecisionReply:
    return await handle.execute_update("decide", approve(number), result_type=DecisionReply)
