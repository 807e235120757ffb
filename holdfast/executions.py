"""What the Temporal server says of an execution, read from its own messages.

Temporal's Python client (1.35) raises ValueError for a status that it does not know, such as that of a paused run. So
every description and every listing goes through here, where an unknown status is a word like any other.
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
"""The server's search attribute of what is paused: the run, or activities of it."""


@dataclass(frozen=True)
class Execution:
    """One execution. `described` is None for one that was only listed."""

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
        """Of the first execution, before any continue-as-new and Reset."""
        return self.info.first_run_id

    @property
    def type(self) -> str:
        return self.info.type.name

    @property
    def status(self) -> str:
        """The server's own word, such as `running`, `paused` or `timed_out`; `status 9` for one without a word yet."""
        try:
            name = WorkflowExecutionStatus.Name(self.info.status)
        except ValueError:
            return f"status {int(self.info.status)}"
        return name.removeprefix("WORKFLOW_EXECUTION_STATUS_").lower()

    @property
    def open(self) -> bool:
        """Whether it can still go on: running, paused, or in a state that is not known here and has no end."""
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
        """The search attributes; several values are joined with commas."""
        found = decode_search_attributes(self.info.search_attributes)
        return {name: ", ".join(map(str, values)) for name, values in found.items()}

    @property
    def version(self) -> tuple[str, int]:
        """Another one as soon as anything has happened in the run."""
        return self.run_id, self.info.history_length

    @property
    def pending_task(self) -> bool:
        """Whether the run has something to do that no worker has done yet."""
        return self.described is not None and self.described.HasField("pending_workflow_task")

    @property
    def task_attempt(self) -> int:
        """How often the workflow task that is pending has been tried; 0 when none is."""
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
            f"paused{by}{why}: the run does nothing, and keeps the Signals that come, until"
            f" `temporal workflow unpause --workflow-id {shlex.quote(self.id)}`"
        )


def _epoch(time: Timestamp) -> float:
    return time.ToDatetime(tzinfo=UTC).timestamp()


def unknown_run(error: RPCError) -> bool:
    """The server knows no such run. A server that has just started may not know its namespace yet, and then says
    "not found" of every run: that says nothing about the run.
    """
    namespace = any("NamespaceNotFound" in each.type_url for each in error.grpc_status.details)
    return error.status is RPCStatusCode.NOT_FOUND and not namespace


async def describe(client: Client, workflow_id: str, run_id: str = "") -> Execution:
    """The execution as it is now; without a run id the current one. Raises RPCError."""
    execution = WorkflowExecution(workflow_id=workflow_id, run_id=run_id)
    request = DescribeWorkflowExecutionRequest(namespace=client.namespace, execution=execution)
    answer = await client.workflow_service.describe_workflow_execution(request, retry=True)
    return Execution(answer.workflow_execution_info, answer)


async def listed(client: Client, query: str, limit: int | None = None) -> AsyncIterator[Execution]:
    """What visibility lists, the newest first. Raises RPCError."""
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
    """Waits for the end. Raises WorkflowFailureError, RPCError.

    The server answers those who wait for a run's end also when the run is paused and when it goes on again, and
    Temporal's Python client (1.35) takes that for a bug.
    """
    while True:
        try:
            return await handle.result()
        except RuntimeError as error:
            if "No completion event" not in str(error):
                raise
        await asyncio.sleep(AGAIN_S)


OPEN = "CloseTime IS NULL"
"""Open executions, for a query: `ExecutionStatus = "Running"` leaves out those that are paused."""


def activity_words(activity: PendingActivityInfo) -> str:
    """That an activity is paused, and the command that lets it go on; empty when it is not."""
    if activity.state not in PAUSED_ACTIVITY:
        return ""
    since = datetime.fromtimestamp(_epoch(activity.pause_info.pause_time)).astimezone()
    by = activity.pause_info.manual.identity if activity.pause_info.HasField("manual") else ""
    why = activity.pause_info.manual.reason if activity.pause_info.HasField("manual") else ""
    who = (f" by {by}" if by else "") + (f" ({why})" if why else "")
    return f"paused{who} since {since:%Y-%m-%d %H:%M:%S}"
