"""The webhooks of a run. Each delivery is a workflow of its own; the run only waits until that has started."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.workflow import ChildWorkflowCancellationType, ParentClosePolicy

from holdfast.contracts.people import Approval
from holdfast.contracts.run import RunResult
from holdfast.contracts.webhooks import Hook
from holdfast.engine.webhooks import ENDED, needs_input, run_is
from workflows.run import Run


async def send(hook: Hook) -> None:
    """Starts the delivery, which outlives this workflow."""
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
        return  # the delivery is running


class Webhooks:
    """The webhooks of one run; none without an address."""

    def __init__(self, run: Run) -> None:
        self._given = run.given
        self._key_base = run.state.key_base
        self._starting: set[asyncio.Task[None]] = set()

    @property
    def idle(self) -> bool:
        """Whether every delivery has started. A run that ends or continues as new before that would lose one."""
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
