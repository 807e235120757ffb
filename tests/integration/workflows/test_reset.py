"""Reset, the operator's way back: recorded turns and effects are found again, not paid or done again."""

from __future__ import annotations

import uuid
from typing import Any

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import WorkflowHandle

from holdfast.contracts.run import RunOutcome, RunResult
from holdfast.testing.model import call, say, sequence
from holdfast.testing.stage import Stage, until
from tests.fixtures.world import World, agent


async def reset(stage: Stage, handle: WorkflowHandle[Any, Any], completed_task: int) -> WorkflowHandle[Any, RunResult]:
    """Resets the run to its n-th completed workflow task (from 1); the handle of the new execution."""
    tasks = [e for e in (await handle.fetch_history()).events if e.HasField("workflow_task_completed_event_attributes")]
    answer = await stage.client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=stage.client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=handle.id),
            reason="test",
            workflow_task_finish_event_id=tasks[completed_task - 1].event_id,
            request_id=uuid.uuid4().hex,
        )
    )
    return stage.client.get_workflow_handle(handle.id, run_id=answer.run_id, result_type=RunResult)


async def test_to_the_beginning_repeats_no_model_call_and_no_effect(stage: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"), world.tool("order"))
    stage.model.script = sequence(call(("book", {})), call(("order", {})), say("done"))
    async with stage.worker():
        handle = await stage.start(spec)
        before = await handle.result()
        again = await (await reset(stage, handle, 1)).result()
    assert again == before
    assert len(stage.model.requests) == 3
    assert world.log == ["begin book#1", "done book#1", "begin order#2", "done order#2"]
    assert await stage.stored(handle) == again


async def test_into_the_middle_goes_on_from_there(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"), world.tool("send", approval=True))
    lite.model.script = sequence(call(("book", {})), call(("send", {})), say("ended"))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        fresh = await reset(lite, handle, 2)
        await until(fresh, lambda s: bool(s.approvals))
        await fresh.signal("decide", {"approval_id": "a2", "verdict": "approve", "approver": "dr.lee"})
        result = await fresh.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert len(lite.model.requests) == 3
    assert world.log == ["begin book#1", "done book#1", "begin send#2", "done send#2"]
