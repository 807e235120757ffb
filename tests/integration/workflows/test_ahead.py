"""A query that waits for a worker while a Signal's workflow task is pending: whatever follows, the history replays."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from temporalio import activity
from temporalio.bridge.proto.workflow_activation import WorkflowActivation
from temporalio.worker import Replayer

from holdfast.engine.ahead import Ahead
from holdfast.engine.client import sandbox
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage
from tests.integration.workflows.evictions import ONE_POLL, Evictions, has
from tests.integration.workflows.plain import Plain, book


@pytest.mark.parametrize("first", ["signal", "completion"])
@pytest.mark.parametrize("second", ["signal", "update"])
async def test_a_query_meets_a_pending_task(
    lite: Stage, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    """Repeated until the worker has got the query before the task: which comes first is the server's choice."""
    evictions, end = Evictions(monkeypatch), asyncio.Event()

    @activity.defn
    async def hold() -> None:
        await end.wait()

    async with lite.worker(activities_only=True, activities=[book, hold]), asyncio.timeout(2 * PATIENCE_S):
        while not evictions.asked.is_set():
            end.clear()
            async with lite.worker(**ONE_POLL, workflows=[Plain]):
                name = f"plain-{uuid.uuid4().hex[:8]}"
                handle = await lite.client.start_workflow(Plain.run, id=name, task_queue=lite.queue)
                await has(handle, "activity_task_scheduled_event_attributes")
            query = asyncio.create_task(handle.query(Plain.told))
            await handle.describe()  # the query is at the server by then
            if first == "signal":
                await handle.signal(Plain.tell, "first")
            else:
                end.set()
                await has(handle, "activity_task_completed_event_attributes")
            async with lite.worker(**ONE_POLL, workflows=[Plain]):
                asked = asyncio.create_task(evictions.asked.wait())
                await asyncio.wait([query, asked], return_when=asyncio.FIRST_COMPLETED)
                if second == "signal":
                    await handle.signal(Plain.tell, "second")
                else:
                    update = asyncio.create_task(handle.execute_update(Plain.ask, "second"))
                    await handle.describe()
                evictions.go_on.set()
                assert await query == (first == "signal")
                if second == "update":
                    assert await update == (2 if first == "signal" else 1)
                asked.cancel()
                end.set()
                if first == "completion":
                    await handle.signal(Plain.tell, "third")
                await handle.result()
            replayer = Replayer(workflows=[Plain], workflow_runner=sandbox(), data_converter=lite.client.data_converter)
            await replayer.replay_workflow(await handle.fetch_history())


@pytest.mark.parametrize(
    ("seconds", "length", "replaying", "moved"),
    [
        (12, 20, False, False),  # the next workflow task
        (10, 9, False, False),  # a second activation of the same task: something was cancelled before it was sent
        (10, 9, True, False),  # a query that finds nothing new
        (10, 12, True, False),  # a replay
        (10, 12, False, True),
    ],
)
def test_only_new_events_without_a_task_are_ahead(seconds: int, length: int, replaying: bool, moved: bool) -> None:
    ahead = Ahead()
    first = WorkflowActivation(timestamp=Timestamp(seconds=10), history_length=9, is_replaying=True)
    again = WorkflowActivation(timestamp=Timestamp(seconds=seconds), history_length=length, is_replaying=replaying)
    assert not ahead.moved(first)
    assert ahead.moved(again) is moved
