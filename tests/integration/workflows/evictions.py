"""A query that has waited for a worker and moves a run ahead of its history, as tests make one."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import temporalio.bridge.worker
from temporalio.client import WorkflowHandle

from holdfast.testing.patience import PATIENCE_S

ONE_POLL: dict[str, Any] = {"workflows_only": True, "max_concurrent_workflow_tasks": 2}
"""Of a worker whose only free poll is with a query until that is answered: the task comes after the next event."""


class Evictions:
    """Knows when a worker asks to drop a run, which is when the query has moved it, and holds the query up there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, evict: bool = True) -> None:
        self.asked = asyncio.Event()
        self.go_on = threading.Event()
        loop, request = asyncio.get_running_loop(), temporalio.bridge.worker.Worker.request_workflow_eviction

        def noted(worker: temporalio.bridge.worker.Worker, run_id: str) -> None:
            if evict:
                request(worker, run_id)
            loop.call_soon_threadsafe(self.asked.set)
            self.go_on.wait(1.5)  # in the thread of the workflow, which may take 2 s

        monkeypatch.setattr(temporalio.bridge.worker.Worker, "request_workflow_eviction", noted)


async def has(handle: WorkflowHandle[Any, Any], event: str) -> None:
    """Waits until the history has an event with these attributes."""
    async with asyncio.timeout(PATIENCE_S):
        while not any(e.HasField(event) for e in (await handle.fetch_history()).events):  # pyright: ignore
            await asyncio.sleep(0.02)
