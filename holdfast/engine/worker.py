"""How a worker polls, which task queues it serves, and what has to be there before it starts."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.worker import WorkerDeploymentConfig, WorkerTuner

from holdfast.authoring import registry
from holdfast.contracts.wording import did_you_mean
from holdfast.engine.client import Client, missing_search_attributes
from holdfast.settings import Settings, settings
from holdfast.state.opening import open_database
from holdfast.state.version import check_schema

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
