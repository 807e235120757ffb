"""A worker as in production: the workflows and activities that it serves, its start and its drain."""

from __future__ import annotations

import asyncio
import signal
import sys
from datetime import timedelta
from typing import Any

from temporalio.worker import Worker

from activities import activities, of_stage
from holdfast.authoring import registry
from holdfast.dev.stack import NOT_SERVED
from holdfast.engine import payload_storage
from holdfast.engine.client import Client, connect, sandbox
from holdfast.engine.runtime import Runtime, open_runtime
from holdfast.engine.worker import BESIDE, SETTINGS, check, slots, versioning
from holdfast.reasoning.loading import load_graphs
from holdfast.reliability.heartbeat import HeartbeatInterceptor
from holdfast.settings import settings
from workflows.agent import AgentWorkflow
from workflows.batch import BatchWorkflow
from workflows.orphan_sweep import OrphanSweep
from workflows.recovery import RepairWorkflow
from workflows.webhook_delivery import DeliveryWorkflow

WORKFLOWS = [AgentWorkflow, BatchWorkflow, RepairWorkflow, OrphanSweep, DeliveryWorkflow]


def make_worker(client: Client, queue: str, runtime: Runtime, stage: str = "", **options: Any) -> Worker:
    """A worker as in production. options: Temporal's, which win. stage: serves only this one, without workflows."""

    def evict(run_id: str) -> None:
        worker._bridge_worker.request_workflow_eviction(run_id)  # pyright: ignore[reportPrivateUsage]

    settled: dict[str, Any] = {
        **SETTINGS,
        "interceptors": [HeartbeatInterceptor()],
        "workflow_runner": sandbox(versioned=bool(runtime.settings.deployment), evict=evict),
        **versioning(runtime.settings),
        **slots(runtime.settings),
        "workflows": [] if stage else WORKFLOWS,
        "activities": of_stage(runtime) if stage else activities(runtime, WORKFLOWS),
    }
    settled |= options
    if "tuner" in settled:  # a tuner sets this limit itself
        settled.pop("max_concurrent_activities", None)
    worker = Worker(client, task_queue=f"{queue}.{stage}" if stage else queue, **settled)
    return worker


async def serve(stages: list[str]) -> int:
    """Runs the workers until a signal stops them, and returns the exit status."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    client = await connect()
    await check(client)
    load_graphs()
    for error in registry.broken().values():
        print(f"{NOT_SERVED}{error}", file=sys.stderr, flush=True)
    drain, queue = settings().drain_s, settings().task_queue
    runtime = await open_runtime(settings())
    workers = [
        make_worker(client, queue, runtime, stage, graceful_shutdown_timeout=timedelta(seconds=drain), **more)
        for stage, more in ((each, BESIDE if each and len(stages) > 1 else {}) for each in stages)
    ]
    working = [asyncio.create_task(worker.run()) for worker in workers]
    stopping = asyncio.create_task(stop.wait())
    queues = ", ".join(worker.task_queue for worker in workers)
    print(f"worker ready: queue {queues} at {client.service_client.config.target_host}", flush=True)
    await asyncio.wait((*working, stopping), return_when=asyncio.FIRST_COMPLETED)
    if failed := next((task for task in working if task.done()), None):
        print(f"worker failed: {failed.exception()}", file=sys.stderr)
        return 1
    print("worker draining", flush=True)
    try:
        # An activity that ignores its cancellation must not keep the process alive: another worker retries it.
        await asyncio.wait_for(asyncio.gather(*(worker.shutdown() for worker in workers)), drain + 2)
    except TimeoutError:
        print(f"worker stopped with work in flight after {drain:.0f} s", file=sys.stderr)
        return 1
    await runtime.close()
    await payload_storage.close(client.data_converter.external_storage)
    return 0
