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

    def stands_still(self) -> None:
        if self._batch and self._state.told % 2 == 0:
            self._tell()

    def goes_on(self) -> None:
        if self._batch and self._state.told % 2 == 1:
            self._tell()

    def _tell(self) -> None:
        self._state.told += 1
        task = asyncio.create_task(self._signal(ChildNews(id=workflow.info().workflow_id, n=self._state.told)))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _signal(self, news: ChildNews) -> None:
        assert self._batch is not None
        try:
            await workflow.get_external_workflow_handle(self._batch.workflow_id).signal("child", news)
        except FailureError as error:
            # The batch was terminated, and its close policy cancels this run: the Signal no longer matters.
            workflow.logger.info("cannot signal the batch %s: %s", self._batch.workflow_id, error)
