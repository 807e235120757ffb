"""Why a run does not go on: what its activity or its workflow task failed with, in words."""

from __future__ import annotations

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflowservice.v1 import GetWorkflowExecutionHistoryReverseRequest
from temporalio.client import Client

from holdfast.codec import PayloadUnreadable


async def words(client: Client, failure: Failure) -> str:
    """A failure's own words and those of its causes; they may be encrypted."""
    try:
        error: BaseException | None = await client.data_converter.decode_failure(failure)
    except PayloadUnreadable as unreadable:
        return str(unreadable)
    said: list[str] = []
    while error is not None:
        said.append(str(error))
        error = error.__cause__
    return ": ".join(said)


async def failing_task(client: Client, workflow_id: str) -> str:
    """What the run's workflow task fails with, again and again; empty when the last one did not fail."""
    request = GetWorkflowExecutionHistoryReverseRequest(
        namespace=client.namespace, execution=WorkflowExecution(workflow_id=workflow_id), maximum_page_size=10
    )
    response = await client.workflow_service.get_workflow_execution_history_reverse(request)
    for event in response.history.events:
        if event.HasField("workflow_task_failed_event_attributes"):
            return await words(client, event.workflow_task_failed_event_attributes.failure)
        if event.HasField("workflow_task_completed_event_attributes"):
            return ""
    return ""
