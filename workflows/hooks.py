"""What a run tells the outside. A delivery is a workflow of its own, and the run only waits until that is there."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.workflow import ChildWorkflowCancellationType, ParentClosePolicy

from holdfast.contracts import AgentInput, Approval, RunResult
from holdfast.hooks import ENDED, Hook, needs_input, run_is


async def send(hook: Hook) -> None:
    """Starts the delivery, which goes on whatever becomes of this workflow."""
    try:
        await workflow.start_child_workflow(
            "DeliveryWorkflow",
            hook,
            id=hook.delivery_id,
            task_timeout=timedelta(seconds=5),
            cancellation_type=ChildWorkflowCancellationType.ABANDON,
            parent_close_policy=ParentClosePolicy.ABANDON,
            static_summary=f"{hook.type} of {hook.workflow_id}",
        )
    except WorkflowAlreadyStartedError:
        return  # and at work


class Hooks:
    """The events of one run. Without an address nothing happens, so a run from before webhooks replays as it was."""

    def __init__(self, given: AgentInput, key_base: str) -> None:
        self._given = given
        self._key_base = key_base
        self._starting: set[asyncio.Task[None]] = set()

    @property
    def idle(self) -> bool:
        """Every delivery is there. A run that ended, or continued as new, before that would lose it."""
        return not self._starting

    def asked(self, approval: Approval) -> None:
        if self._given.webhook:
            about = workflow.info().workflow_id, self._key_base
            task = asyncio.create_task(send(needs_input(self._given, *about, approval, workflow.now())))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def ended(self, result: RunResult) -> None:
        if self._given.webhook:
            await workflow.wait_condition(lambda: self.idle)
            about = workflow.info().workflow_id, self._given.request_key, self._given.tenant
            await send(run_is(ENDED, result, *about, workflow.now()))
