"""Tells the batch that started a run when the run waits, so that another item gets its place meanwhile."""

from __future__ import annotations

import asyncio

from temporalio import workflow
from temporalio.exceptions import FailureError

from holdfast.contracts.batch import ChildNews
from workflows.state import RunState


class Parent:
    """Does nothing for a run without a batch. The state has what was told, so continue-as-new repeats no Signal.

    A run whose call is tried again and waits again has waited all the time. Only real progress is reported; otherwise
    the children that wait for a service that is down for hours would fill the batch's history.
    """

    def __init__(self, state: RunState) -> None:
        self._batch = workflow.info().parent
        self._state = state
        self._telling: set[asyncio.Task[None]] = set()

    def run_waits(self) -> None:
        self._tell(waits=True)

    def run_goes_on(self) -> None:
        self._tell(waits=False)

    def _tell(self, *, waits: bool) -> None:
        state = self._state
        if self._batch is None or waits is state.told_waits:
            return
        state.told_waits = waits
        state.told += 1
        news = ChildNews(id=workflow.info().workflow_id, number=state.told, waits=waits)
        task = asyncio.create_task(self._signal(self._batch.workflow_id, news))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _signal(self, batch: str, news: ChildNews) -> None:
        try:
            await workflow.get_external_workflow_handle(batch).signal("child", news)
        except FailureError as error:
            # The batch was terminated, and its close policy cancels this run: the Signal no longer matters.
            workflow.logger.info("cannot signal the batch %s: %s", batch, error)
