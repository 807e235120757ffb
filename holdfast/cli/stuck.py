"""Why a run makes no progress: what is paused, and how its activities or its workflow task fail."""

from __future__ import annotations

import shlex

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import WorkflowTaskFailedCause
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflowservice.v1 import GetWorkflowExecutionHistoryReverseRequest
from temporalio.client import Client

from holdfast.contracts.data import Json
from holdfast.contracts.failures import ErrorType
from holdfast.engine.encryption import PayloadUnreadable
from holdfast.engine.executions import Execution, activity_words

RECENT = 100
"""How many events are searched for the last workflow task's failure: Signals may have come since."""


async def words(client: Client, failure: Failure) -> str:
    """The messages of a failure and its causes, decrypted when they are encrypted."""
    try:
        error: BaseException | None = await client.data_converter.decode_failure(failure)
    except PayloadUnreadable as unreadable:
        return str(unreadable)
    said: list[str] = []
    while error is not None:
        said.append(str(error))
        error = error.__cause__
    return ": ".join(said)


async def failing_task(client: Client, execution: Execution) -> str:
    """A sentence on the failure of the run's workflow task; empty when the last one did not fail."""
    if execution.task_attempt < 2:
        return ""
    where = WorkflowExecution(workflow_id=execution.id, run_id=execution.run_id)
    request = GetWorkflowExecutionHistoryReverseRequest(
        namespace=client.namespace, execution=where, maximum_page_size=RECENT
    )
    response = await client.workflow_service.get_workflow_execution_history_reverse(request)
    for event in response.history.events:
        if event.HasField("workflow_task_failed_event_attributes"):
            failed = event.workflow_task_failed_event_attributes
            if failed.cause == WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_RESET_WORKFLOW:
                break
            why = await words(client, failed.failure)
            return f"its workflow task fails and is tried again (attempt {execution.task_attempt}): {why}"
        if event.HasField("workflow_task_completed_event_attributes"):
            break
    return ""


async def in_flight(client: Client, execution: Execution | None) -> list[Json]:
    """The open activities: how the last attempt failed (or "not ready"), and when the next attempt starts.

    `paused`: the command that unpauses the activity; empty when it is not paused.
    """
    found: list[Json] = []
    for each in execution.pending_activities if execution is not None else ():
        said = await words(client, each.last_failure) if each.HasField("last_failure") else ""
        paused = activity_words(each)
        if paused and execution is not None:
            which = f"--workflow-id {shlex.quote(execution.id)} --activity-id {shlex.quote(each.activity_id)}"
            paused += f": `temporal activity unpause {which}` lets it go on"
        found.append(
            {
                "activity": each.activity_type.name,
                "attempt": each.attempt,
                "said": said.removeprefix(f"{ErrorType.NOT_YET}: "),
                "next_at": each.next_attempt_schedule_time.seconds or None,
                "paused": paused,
            }
        )
    return found
