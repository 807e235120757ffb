"""Worker versioning: the builds of a Worker Deployment as the server knows them, and whose runs cannot go on.

A run is pinned to the build that it began on; workflows that compensate (repairs, the sweep) go to the current build.
See docs/how-to/deployment.md for the steps of a deploy.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from temporalio.api.deployment.v1 import WorkerDeploymentVersion
from temporalio.api.enums.v1 import TaskQueueType, VersionDrainageStatus
from temporalio.api.taskqueue.v1 import PollerInfo, TaskQueue
from temporalio.api.workflowservice.v1 import (
    DescribeTaskQueueRequest,
    DescribeWorkerDeploymentRequest,
    DescribeWorkerDeploymentResponse,
    DescribeWorkerDeploymentVersionRequest,
    DescribeWorkerDeploymentVersionResponse,
)
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

SEEN_S = 75.0
"""Seconds. A worker polls at least once a minute; one that has not polled for this long is gone."""
WAITS_S = 5.0
"""Seconds. A running worker takes a task at once; a task that waits longer has no worker."""
CURRENT = "temporal worker deployment set-current-version --deployment-name {name}"
"""The command that sends new runs to a build."""


class DeploymentError(Exception):
    """The server does not describe the deployment. The message is one line that says what to do."""


@dataclass(frozen=True)
class Build:
    """A build of the deployment."""

    build: str
    state: str
    """current, ramping, draining (no new runs, some open), drained (none open), inactive (never had any)."""
    open_runs: int
    """Open runs that are pinned to this build."""
    workers: int
    """Processes that polled within the last 75 s."""
    backlog: int
    """Tasks that wait for a worker of this build."""
    waiting_s: float
    """Age of the oldest of these tasks, in seconds."""

    @property
    def trouble(self) -> str:
        """Why runs of this build do not go on; empty when they do."""
        if self.backlog and self.waiting_s >= WAITS_S:
            return f"{self.backlog} tasks of build {self.build} have waited for up to {self.waiting_s:.0f} s"
        takes = self.open_runs or self.state in ("current", "ramping")
        return (
            f"no worker of build {self.build} for its {self.open_runs} open runs" if takes and not self.workers else ""
        )


@dataclass(frozen=True)
class Deployment:
    name: str
    builds: list[Build]
    """Sorted by age, newest first."""

    @property
    def current(self) -> str:
        """The build that takes new runs. Empty: no build, so new runs go to workers that are not versioned."""
        return next((build.build for build in self.builds if build.state == "current"), "")

    @property
    def troubles(self) -> list[str]:
        """The reasons why runs do not go on, each with what to do."""
        found = [
            f"{build.trouble}: start one with HOLDFAST_DEPLOYMENT={self.name} HOLDFAST_BUILD_ID={build.build}"
            for build in self.builds
            if build.trouble
        ]
        if not self.current:
            found.append(
                "no build is current, so new runs wait for workers that are not versioned: "
                f"run `{CURRENT.format(name=self.name)} --build-id BUILD`"
            )
        return found


async def describe(client: Client, name: str) -> Deployment:
    """Returns the deployment with its builds. Raises DeploymentError, RPCError."""
    answer = await _describe(client, name)
    routing = answer.worker_deployment_info.routing_config
    current = routing.current_deployment_version.build_id
    ramping = routing.ramping_deployment_version.build_id
    builds = []
    for each in answer.worker_deployment_info.version_summaries:
        build = each.deployment_version.build_id
        if build == current:
            state = "current"
        elif build == ramping:
            state = "ramping"
        elif each.drainage_status == VersionDrainageStatus.VERSION_DRAINAGE_STATUS_DRAINING:
            state = "draining"
        elif each.drainage_status == VersionDrainageStatus.VERSION_DRAINAGE_STATUS_DRAINED:
            state = "drained"
        else:
            state = "inactive"
        builds.append((each.create_time.ToDatetime(), await _build(client, name, build, state)))
    return Deployment(name, [build for _, build in sorted(builds, key=lambda pair: pair[0], reverse=True)])


async def takes_new_runs(client: Client, queue: str) -> tuple[str, str]:
    """Returns the deployment and build that take the new runs of a task queue.

    Two empty strings: workers that are not versioned take them. Raises RPCError.
    """
    answer = await client.workflow_service.describe_task_queue(
        DescribeTaskQueueRequest(
            namespace=client.namespace,
            task_queue=TaskQueue(name=queue),
            task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
        )
    )
    current = answer.versioning_info.current_deployment_version
    return current.deployment_name, current.build_id


def without_versions(name: str) -> str:
    """Returns the command that sends new runs to workers that are not versioned."""
    return f"{CURRENT.format(name=name)} --unversioned"


async def _describe(client: Client, name: str) -> DescribeWorkerDeploymentResponse:
    try:
        return await client.workflow_service.describe_worker_deployment(
            DescribeWorkerDeploymentRequest(namespace=client.namespace, deployment_name=name)
        )
    except RPCError as error:
        raise _deployment_error(error, name) from None


async def _build(client: Client, name: str, build: str, state: str) -> Build:
    request = DescribeWorkerDeploymentVersionRequest(
        namespace=client.namespace,
        deployment_version=WorkerDeploymentVersion(deployment_name=name, build_id=build),
        report_task_queue_stats=True,
    )
    try:
        answer = await client.workflow_service.describe_worker_deployment_version(request)
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        answer = DescribeWorkerDeploymentVersionResponse()  # its first worker has only just announced it
    pinned = f'TemporalWorkerDeploymentVersion="{name}:{build}" AND TemporalWorkflowVersioningBehavior="Pinned"'
    runs = await client.count_workflows(f'{pinned} AND ExecutionStatus="Running"')
    stats = [queue.stats for queue in answer.version_task_queues]
    queues = sorted({queue.name for queue in answer.version_task_queues})
    return Build(
        build=build,
        state=state,
        open_runs=runs.count,
        workers=len({poller.identity for queue in queues for poller in await _pollers(client, queue, name, build)}),
        backlog=sum(each.approximate_backlog_count for each in stats),
        waiting_s=max((each.approximate_backlog_age.ToTimedelta().total_seconds() for each in stats), default=0.0),
    )


async def _pollers(client: Client, queue: str, name: str, build: str) -> Sequence[PollerInfo]:
    """Returns recent pollers of the queue of this build. The server lists pollers for minutes after they are gone."""
    found: list[PollerInfo] = []
    for kind in (TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY):
        answer = await client.workflow_service.describe_task_queue(
            DescribeTaskQueueRequest(namespace=client.namespace, task_queue=TaskQueue(name=queue), task_queue_type=kind)
        )
        found += [
            poller
            for poller in answer.pollers
            if (poller.deployment_options.deployment_name, poller.deployment_options.build_id) == (name, build)
            and time.time() - poller.last_access_time.ToMicroseconds() / 1e6 < SEEN_S
        ]
    return found


def _deployment_error(error: RPCError, name: str) -> DeploymentError:
    match error.status:
        case RPCStatusCode.UNIMPLEMENTED:
            return DeploymentError("this server does not support Worker Deployments: use Temporal 1.29 or newer")
        case RPCStatusCode.NOT_FOUND:
            todo = f"start workers with HOLDFAST_DEPLOYMENT={name} and a HOLDFAST_BUILD_ID of their own"
            return DeploymentError(f"the server has no such build of {name!r} yet ({error.message}): {todo}")
        case RPCStatusCode.PERMISSION_DENIED:
            return DeploymentError(
                f"not allowed: {error.message}: check that Worker Deployments are enabled for the namespace"
            )
        case _:
            return DeploymentError(f"the server does not describe the deployment: {error.message}")
