"""Runs a worker: `uv run worker.py [--queue NAME]`.

The connection comes from the standard Temporal profile and `TEMPORAL_*`. SIGTERM and SIGINT drain: nothing new is
taken, what is in flight may finish within `HOLDFAST_DRAIN_S` seconds, and what does not is done by another worker.
Exit status: 0 after a drain, 1 when the worker failed or the drain's limit passed, 2 when it cannot start.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from datetime import timedelta
from typing import Any

import uvloop
from temporalio.worker import Worker

import activities
from holdfast.cli.ending import end_process
from holdfast.reliability import faults
from holdfast.reliability.heartbeat import HeartbeatInterceptor
from holdfast.runtime import Runtime, open_runtime
from holdfast.settings import settings
from holdfast.state.database import StoreUnavailable, open_database
from holdfast.state.version import SchemaMismatch, check_schema
from holdfast.temporal import Client, NoServer, connect, missing_search_attributes, sandbox
from workflows.agent import AgentWorkflow
from workflows.orphans import OrphanSweep
from workflows.repair import RepairWorkflow

SETTINGS: dict[str, Any] = {
    "max_concurrent_activities": 200,
    # A killed worker's parked runs wait this long for it before another one takes them.
    "sticky_queue_schedule_to_start_timeout": timedelta(seconds=0.5),
    # Heartbeats tell the server that a worker is alive; throttled to 30 s by default, they would tell it too late.
    "max_heartbeat_throttle_interval": timedelta(seconds=0.5),
    "default_heartbeat_throttle_interval": timedelta(seconds=0.5),
}
"""How a worker polls, caches and beats, whatever runs on it."""


class NotReady(Exception):
    """Something that a worker needs is not there. The message says what to do."""


async def check(client: Client) -> None:
    """Raises NotReady, SchemaMismatch or StoreUnavailable when runs would get stuck on this worker."""
    store = await open_database(settings().store_url)
    try:
        await check_schema(store)
    finally:
        await store.close()
    if missing := await missing_search_attributes(client):
        raise NotReady(f"search attributes missing: {', '.join(missing)}; run `uv run starter.py doctor --fix`")


def make_worker(client: Client, queue: str, runtime: Runtime, **options: Any) -> Worker:
    """A worker as production runs it; `options` are Temporal's and win."""
    settled: dict[str, Any] = {
        **SETTINGS,
        "interceptors": [HeartbeatInterceptor()],
        "workflow_runner": sandbox(),
        # Stands in half of a run's events; the default is a hash that tells a reader nothing.
        "build_id": runtime.settings.build_id,
        "workflows": [AgentWorkflow, RepairWorkflow, OrphanSweep],
        "activities": activities.activities(runtime),
    }
    return Worker(client, task_queue=queue, **(settled | options))


async def serve(queue: str) -> int:
    """Works until a signal says stop; the exit status."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    client = await connect()
    await check(client)
    drain = settings().drain_s
    runtime = await open_runtime(settings())
    worker = make_worker(client, queue, runtime, graceful_shutdown_timeout=timedelta(seconds=drain))
    working = asyncio.create_task(worker.run())
    stopping = asyncio.create_task(stop.wait())
    print(f"worker ready: queue {queue} at {client.service_client.config.target_host}", flush=True)
    await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    if working.done():
        print(f"worker failed: {working.exception()}", file=sys.stderr)
        return 1
    print("worker draining", flush=True)
    try:
        # An activity that ignores its cancellation must not keep the process: another worker will do its work.
        await asyncio.wait_for(worker.shutdown(), drain + 2)
    except TimeoutError:
        print(f"worker stopped with work in flight after {drain:.0f} s", file=sys.stderr)
        return 1
    await runtime.close()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs a worker of the agent platform.")
    parser.add_argument("--queue", help="task queue to take work from (HOLDFAST_TASK_QUEUE)")
    queue = parser.parse_args().queue
    try:
        faults.arm_from_environment()
        return uvloop.run(serve(queue or settings().task_queue))
    except (NoServer, NotReady, SchemaMismatch, StoreUnavailable, ValueError) as error:
        print(f"worker cannot start: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    end_process(main())
