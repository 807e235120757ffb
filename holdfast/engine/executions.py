"""Describes and lists workflow executions, read from the server's raw messages.

Temporal's Python client (1.35) raises ValueError for a status that it does not know, such as that of a paused run. So
all descriptions and listings use this module, which returns an unknown status as text.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import PendingActivityState, WorkflowExecutionStatus
from temporalio.api.workflow.v1 import PendingActivityInfo, WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import (
    DescribeWorkflowExecutionRequest,
    DescribeWorkflowExecutionResponse,
    ListWorkflowExecutionsRequest,
)
from temporalio.client import Client, WorkflowHandle
from temporalio.converter import decode_search_attributes
from temporalio.service import RPCError, RPCStatusCode

PAGE = 200
AGAIN_S = 0.2
T = TypeVar("T")
PAUSED_ACTIVITY = (
    PendingActivityState.PENDING_ACTIVITY_STATE_PAUSED,
    PendingActivityState.PENDING_ACTIVITY_STATE_PAUSE_REQUESTED,
)
PROBLEMS = "TemporalReportedProblems"
"""The server's search attribute (1.30 and later) of runs whose workflow task failed five times in a row."""
PAUSE = "TemporalPauseInfo"
"""The server's search attribute for what is paused: the run, or some of its activities."""


@dataclass(frozen=True)
class Execution:
    """A workflow execution. `described` is None if it was only listed."""

    info: WorkflowExecutionInfo
    described: DescribeWorkflowExecutionResponse | None = None

    @property
    def id(self) -> str:
        return self.info.execution.workflow_id

    @property
    def run_id(self) -> str:
        return self.info.execution.run_id

    @property
    def first_run_id(self) -> str:
        """The run id of the first execution, before any continue-as-new or Reset."""
        return self.info.first_run_id

    @property
    def type(self) -> str:
        return self.info.type.name

    @property
    def status(self) -> str:
        """The server's name, such as `running`, `paused` or `timed_out`; `status 9` for one without a known name."""
        try:
            name = WorkflowExecutionStatus.Name(self.info.status)
        except ValueError:
            return f"status {int(self.info.status)}"
        return name.removeprefix("WORKFLOW_EXECUTION_STATUS_").lower()

    @property
    def open(self) -> bool:
        """Whether the execution has not ended: running, paused, or in an unknown status without a close time."""
        return not self.info.HasField("close_time")

    @property
    def paused(self) -> bool:
        return self.info.status == WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_PAUSED

    @property
    def started_at(self) -> float:
        return _epoch(self.info.start_time)

    @property
    def ended_at(self) -> float | None:
        return None if self.open else _epoch(self.info.close_time)

    @property
    def attributes(self) -> dict[str, str]:
        """The search attributes; multiple values are joined with commas."""
        found = decode_search_attributes(self.info.search_attributes)
        return {name: ", ".join(map(str, values)) for name, values in found.items()}

    @property
    def version(self) -> tuple[str, int]:
        """Changes whenever anything happens in the run."""
        return self.run_id, self.info.history_length

    @property
    def pending_task(self) -> bool:
        """Whether a workflow task of the run is pending."""
        return self.described is not None and self.described.HasField("pending_workflow_task")

    @property
    def task_attempt(self) -> int:
        """The attempt of the pending workflow task; 0 when none is pending."""
        return self.described.pending_workflow_task.attempt if self.described is not None else 0

    @property
    def pending_activities(self) -> list[PendingActivityInfo]:
        return list(self.described.pending_activities) if self.described is not None else []

    @property
    def paused_words(self) -> str:
        """`paused by … (lunch): temporal workflow unpause …`; empty for a run that is not paused."""
        if not self.paused:
            return ""
        pause = self.described.workflow_extended_info.pause_info if self.described is not None else None
        by = f" by {pause.identity}" if pause and pause.identity else ""
        why = f" ({pause.reason})" if pause and pause.reason else ""
        return (
            f"paused{by}{why}: the run does nothing, and keeps the Signals that come, until you run"
            f" `temporal workflow unpause --workflow-id {shlex.quote(self.id)}`"
        )


def _epoch(time: Timestamp) -> float:
    return time.ToDatetime(tzinfo=UTC).timestamp()


def unknown_run(error: RPCError) -> bool:
    """Whether the server does not know the run.

    A server that has just started may not know its namespace yet. It then answers "not found" for every run, which says
    nothing about the run.
    """
    namespace = any("NamespaceNotFound" in each.type_url for each in error.grpc_status.details)
    return error.status is RPCStatusCode.NOT_FOUND and not namespace


async def describe(client: Client, workflow_id: str, run_id: str = "") -> Execution:
    """Describes an execution; without a run id the current one. Raises RPCError."""
    execution = WorkflowExecution(workflow_id=workflow_id, run_id=run_id)
    request = DescribeWorkflowExecutionRequest(namespace=client.namespace, execution=execution)
    answer = await client.workflow_service.describe_workflow_execution(request, retry=True)
    return Execution(answer.workflow_execution_info, answer)


async def listed(client: Client, query: str, limit: int | None = None) -> AsyncIterator[Execution]:
    """Yields the executions that visibility lists for a query, newest first. Raises RPCError."""
    token, left = b"", limit
    while left is None or left > 0:
        size = PAGE if left is None else min(PAGE, left)
        request = ListWorkflowExecutionsRequest(
            namespace=client.namespace, query=query, page_size=size, next_page_token=token
        )
        answer = await client.workflow_service.list_workflow_executions(request, retry=True)
        for info in answer.executions:
            yield Execution(info)
        token = answer.next_page_token
        left = None if left is None else left - len(answer.executions)
        if not token:
            return


async def result_of(handle: WorkflowHandle[Any, T]) -> T:
    """Waits for the end of a run and returns its result. Raises WorkflowFailureError, RPCError.

    The server also answers a call that waits for the end when the run is paused or unpaused. Temporal's Python client
    (1.35) treats that as a bug and raises RuntimeError.
    """
    while True:
        try:
            return await handle.result()
        except RuntimeError as error:
            if "No completion event" not in str(error):
                raise
        await asyncio.sleep(AGAIN_S)


OPEN = "CloseTime IS NULL"
"""Visibility query for open executions. `ExecutionStatus = "Running"` would omit paused ones."""


def activity_words(activity: PendingActivityInfo) -> str:
    """Says who paused an activity, when and why; empty when it is not paused."""
    if activity.state not in PAUSED_ACTIVITY:
        return ""
    since = datetime.fromtimestamp(_epoch(activity.pause_info.pause_time)).astimezone()
    by = activity.pause_info.manual.identity if activity.pause_info.HasField("manual") else ""
    why = activity.pause_info.manual.reason if activity.pause_info.HasField("manual") else ""
    who = (f" by {by}" if by else "") + (f" ({why})" if why else "")
    return f"paused{who} since {since:%Y-%m-%d %H:%M:%S}"
