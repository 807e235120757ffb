"""A run that was started by a batch tells it when it stands still, so that another item gets its place meanwhile."""

from __future__ import annotations

import asyncio

from temporalio import workflow
from temporalio.exceptions import FailureError

from holdfast.batch import ChildNews
from workflows.state import RunState


class Parent:
    """Says nothing when there is none. What was told is in the state: a run that continues as new says nothing twice.

    A run that is tried again and waits again has stood still all the time: only what has really gone on counts, or the
    children of a service that is down for hours would fill the batch's history.
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
            # It was terminated, and asks this run to cancel: whether it has heard of us is all the same.
            workflow.logger.info("the batch %s does not hear: %s", self._batch.workflow_id, error)
