"""Finding a run in Temporal and in the store, and asking it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from shlex import quote
from typing import Any

from pydantic import ValidationError
from temporalio.client import (
    Client,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowQueryRejectedError,
)
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from holdfast import hooks
from holdfast.cli.output import Refused, err
from holdfast.cli.stuck import failing_task
from holdfast.contracts import RunResult
from holdfast.executions import Execution, describe, result_of
from holdfast.settings import settings
from holdfast.state.database import StoreUnavailable, open_database
from holdfast.state.runs import Run, Runs
from holdfast.wording import ID, did_you_mean

ANSWER = timedelta(seconds=5)
"""How long a worker may take to answer a query or an update before we go on without it."""

COMPARED = 500
"""Runs, the latest ones, among which one is looked for whose id is like one that is not there."""

LOOK_S = 0.1
"""How often a run is described while its next step waits for a worker."""

Handle = WorkflowHandle[Any, RunResult]


class NoAnswer(Exception):
    """The run cannot be asked now. The message says why."""


@asynccontextmanager
async def open_runs() -> AsyncIterator[Runs]:
    """The `runs` table. Raises StoreUnavailable."""
    db = await open_database(settings().store_url)
    try:
        yield Runs(db)
    finally:
        await db.close()


async def stored(workflow_id: str) -> Run | None:
    """The store's row of a run; None when there is none, or no store: Temporal may still know the run."""
    try:
        async with open_runs() as runs:
            return await runs.by_workflow(workflow_id)
    except StoreUnavailable as error:
        words = filter(None, (str(error), settings().kept_by_the_stack("DATABASE_URL")))
        err.print(f"note: {'; '.join(words)}", style="dim", markup=False)
        return None


def link(client: Client, workflow_id: str, run_id: str = "") -> str:
    """The run's page in the Web UI; of an execution (run_id) the tab that shows what is asked and how to answer."""
    page = hooks.page(settings().ui_url, client.namespace, workflow_id)
    return f"{page}/{run_id}/user-metadata" if run_id else page


@dataclass
class Known:
    """What there is of a run: Temporal's execution, the store's row, or both."""

    workflow_id: str
    handle: Handle
    execution: Execution | None
    row: Run | None

    @property
    def running(self) -> bool:
        """It has not ended; it may be paused."""
        return self.execution is not None and self.execution.open

    @property
    def paused_words(self) -> str:
        return self.execution.paused_words if self.execution is not None else ""

    async def result(self) -> RunResult | None:
        """How the run ended; None when it has not, or its end is not recorded (it was terminated).

        The store comes first: what is repaired after the end is only there.
        """
        row = self.row or await stored(self.workflow_id)
        if row is not None and row.result:
            return RunResult.model_validate_json(row.result)
        if self.execution is not None and not self.running:
            with suppress(RPCError):
                return await temporal_result(self.handle)
        return None


async def find(client: Client, workflow_id: str, *, with_row: bool = False) -> Known:
    """The run, from Temporal, else from the store. Raises Refused when neither knows it."""
    handle = client.get_workflow_handle(workflow_id, result_type=RunResult)
    execution, row = None, None
    try:
        execution = await describe(client, workflow_id)
    except RPCError as error:
        if error.status not in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
            raise
    if execution is None or with_row:
        row = await stored(workflow_id)
    if execution is None and row is None:
        raise Refused(f"no run {workflow_id!r}: {await _meant(workflow_id)}")
    if execution is not None and execution.type not in ("AgentWorkflow", "BatchWorkflow"):
        raise Refused(f"{workflow_id} is a workflow of type {execution.type}, not a run of an agent")
    return Known(workflow_id, handle, execution, row)


async def _meant(key: str) -> str:
    """What to do about an id that is no run's: it may be the request key of one."""
    with suppress(StoreUnavailable):
        async with open_runs() as runs:
            if found := await runs.of_key(key):
                return f"did you mean {' or '.join(quote(row.workflow_id) for row in found)}?"
            like = did_you_mean(key, [row.workflow_id for row in await runs.recent(COMPARED)], ID)
            return f"`uv run starter.py list` shows those there are{like}"
    return "`uv run starter.py list` shows those there are"


async def find_running(client: Client, workflow_id: str) -> Known:
    """The run, if it can still be acted on. Raises Refused when it has ended or is unknown."""
    known = await find(client, workflow_id)
    if known.running:
        return known
    result = await known.result()
    how = result.outcome.value if result else status_word(known.execution)
    raise Refused(f"{workflow_id} has ended ({how}): see `uv run starter.py result {quote(workflow_id)}`")


def status_word(execution: Execution | None) -> str:
    """Temporal's own word for it, such as `running`, `paused` or `timed_out`."""
    return execution.status if execution is not None else "unknown"


async def temporal_result(handle: Handle) -> RunResult | None:
    """Waits for the end. None for an end that carries no result: cancelled (the store has it) or terminated."""
    try:
        return await result_of(handle)
    except WorkflowFailureError as error:
        cause = error.cause
        if isinstance(cause, ApplicationError) and cause.details:
            with suppress(ValidationError):
                return RunResult.model_validate(cause.details[0])
        return None


async def ask(client: Client, handle: Handle, query: str, kind: Any) -> Any:
    """A query's answer, for what only an open run knows. Raises NoAnswer.

    It goes out while no workflow task is pending: a query that reaches a worker which has to replay the run first
    makes Temporal's Python SDK (1.35) apply a waiting Signal out of order, and the run may never replay again.
    """
    await _answerable(client, handle.id)
    try:
        return await handle.query(query, result_type=kind, rpc_timeout=ANSWER)
    except RPCError as error:
        if error.status in (
            RPCStatusCode.DEADLINE_EXCEEDED,
            RPCStatusCode.CANCELLED,
            RPCStatusCode.FAILED_PRECONDITION,
        ):
            raise NoAnswer(NO_WORKER) from None
        raise
    except (WorkflowQueryFailedError, WorkflowQueryRejectedError) as error:
        raise NoAnswer(f"the run does not answer: {error}") from None
    except ValueError as error:
        if "WorkflowExecutionStatus" not in str(error):
            raise
        raise NoAnswer("it was paused just now") from None  # the SDK has no word for why the server rejects the query


NO_WORKER = "no worker answers: is one running for this task queue? (`uv run worker.py`)"


async def _answerable(client: Client, workflow_id: str) -> None:
    """Waits until the run has nothing left to do that no worker has done yet. Raises NoAnswer when it cannot be asked.

    A run that is busy all that time is asked all the same: it has a worker.
    """
    first: Execution | None = None
    until = asyncio.get_running_loop().time() + ANSWER.total_seconds()
    while True:
        now = await describe(client, workflow_id)
        first = first or now
        if not now.open:
            raise NoAnswer(f"it has ended ({now.status})")
        if now.paused:
            raise NoAnswer(now.paused_words)
        if failing := await failing_task(client, now):
            raise NoAnswer(failing)
        if not now.pending_task:
            return
        if asyncio.get_running_loop().time() >= until:
            if now.version != first.version:
                return
            raise NoAnswer(NO_WORKER)
        await asyncio.sleep(LOOK_S)
