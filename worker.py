"""Runs a worker: `uv run worker.py [--queue STAGE]`.

A tool may name a stage, which is a separate task queue. Without `--queue`, the worker serves the main queue and every
stage; with `--queue extract`, only that stage; with `--queue main`, everything but the stages.

The connection comes from the standard Temporal profile and `TEMPORAL_*`. On SIGTERM or SIGINT the worker drains: it
takes no new tasks and gives those in flight `HOLDFAST_DRAIN_S` seconds to finish; another worker does the rest.
Exit status: 0 after a drain, 1 when the worker fails or the drain exceeds its limit, 2 when it cannot start.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from datetime import timedelta
from typing import Any

import uvloop
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.service import RPCError
from temporalio.worker import Worker, WorkerDeploymentConfig, WorkerTuner

import activities
from holdfast.authoring import registry
from holdfast.cli.ending import end_process
from holdfast.cli.errors import mendable
from holdfast.contracts.wording import did_you_mean
from holdfast.dev.stack import NOT_SERVED
from holdfast.engine import payload_storage
from holdfast.engine.client import Client, NoServer, connect, missing_search_attributes, sandbox
from holdfast.engine.runtime import Runtime, open_runtime
from holdfast.reliability import crash_points
from holdfast.reliability.heartbeat import HeartbeatInterceptor
from holdfast.settings import Settings, settings, unfit
from holdfast.state.database import StoreUnavailable, one_line
from holdfast.state.opening import open_database
from holdfast.state.version import SchemaMismatch, check_schema
from workflows.all_workflows import WORKFLOWS

MAIN = "main"
SETTINGS: dict[str, Any] = {
    "max_concurrent_activities": 200,
    # A run that a killed worker had cached waits this long before another worker takes it.
    "sticky_queue_schedule_to_start_timeout": timedelta(seconds=0.5),
    # The SDK throttles heartbeats to 30 s by default: the server would notice a dead worker too late.
    "max_heartbeat_throttle_interval": timedelta(seconds=0.5),
    "default_heartbeat_throttle_interval": timedelta(seconds=0.5),
}
"""How every worker polls, caches and heartbeats."""

BESIDE: dict[str, Any] = {"max_concurrent_activities": 50}
"""For each stage in a worker that serves all queues."""


class NotReady(Exception):
    """Something that a worker needs is missing. The message says what to do."""


async def check(client: Client) -> None:
    """Raises NotReady, SchemaMismatch or StoreUnavailable when runs would get stuck on this worker."""
    store = await open_database(settings().store_url)
    try:
        await check_schema(store)
    finally:
        await store.close()
    if missing := await missing_search_attributes(client):
        raise NotReady(f"search attributes missing: {', '.join(missing)}; run `uv run starter.py doctor --fix`")


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
        "activities": activities.of_stage(runtime) if stage else activities.activities(runtime),
    }
    settled |= options
    if "tuner" in settled:  # a tuner sets this limit itself
        settled.pop("max_concurrent_activities", None)
    worker = Worker(client, task_queue=f"{queue}.{stage}" if stage else queue, **settled)
    return worker


def slots(of: Settings) -> dict[str, Any]:
    """The worker's options that limit how much it does at a time."""
    if of.slots == "resource":
        return {
            "tuner": WorkerTuner.create_resource_based(
                target_memory_usage=of.slots_memory, target_cpu_usage=of.slots_cpu
            )
        }
    return {"max_concurrent_activities": of.slots}


def versioning(of: Settings) -> dict[str, Any]:
    """The worker's options that identify its build. Raises NotReady for a versioned worker without a build id."""
    if not of.deployment:
        # Half of a run's events show the build id; the SDK's default is a hash that tells a reader nothing.
        return {"build_id": of.build_id}
    if "build_id" not in of.model_fields_set:
        raise NotReady("HOLDFAST_DEPLOYMENT needs HOLDFAST_BUILD_ID: two builds of one name would share their runs")
    return {
        "deployment_config": WorkerDeploymentConfig(
            version=WorkerDeploymentVersion(of.deployment, of.build_id),
            use_worker_versioning=True,
            default_versioning_behavior=VersioningBehavior.PINNED,
        )
    }


def chosen(queue: str | None) -> list[str]:
    """The stages that `--queue` asks for; the empty one is the main queue. Raises NotReady for an unknown one."""
    stages = registry.stages()
    if queue is None:
        return ["", *stages]
    if queue != MAIN and queue not in stages:
        there = ", ".join([MAIN, *stages]) + "".join(f"; broken: {error}" for error in registry.broken().values())
        meant = did_you_mean(queue, [MAIN, *stages])
        raise NotReady(f"--queue {queue}: there is no such stage; the agents' tools name: {there}{meant}")
    return ["" if queue == MAIN else queue]


async def serve(stages: list[str]) -> int:
    """Runs the workers until a signal stops them, and returns the exit status."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    client = await connect()
    await check(client)
    from holdfast.reasoning.loading import load_graphs  # LangGraph imports OpenTelemetry's SDK

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


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs a worker of the agent platform.")
    try:
        stages = ", ".join(registry.stages())
        parser.add_argument(
            "--queue",
            metavar="STAGE",
            help=f"serve only one stage ({stages}), or `{MAIN}` for all but the stages; default: everything."
            " The task queues are HOLDFAST_TASK_QUEUE and, for a stage, HOLDFAST_TASK_QUEUE.STAGE",
        )
        queue = parser.parse_args().queue
        crash_points.arm_from_environment()
        return uvloop.run(serve(chosen(queue)))
    except RPCError as error:
        said = f"the Temporal server answered {error.status.name.lower()}: {error.message}"
        print(f"worker cannot start: {said}; see `uv run starter.py doctor`", file=sys.stderr)
        return 2
    except (NoServer, NotReady, SchemaMismatch, StoreUnavailable, registry.BrokenAgent, ValueError) as error:
        print(f"worker cannot start: {unfit(error) or one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if (words := mendable(error)) is None:
            raise
        print(f"worker cannot start: {words}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    end_process(main())
