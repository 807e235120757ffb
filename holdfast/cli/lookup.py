"""Finds runs in Temporal and in the store, and queries them."""

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

from holdfast.cli.output import Refused, err
from holdfast.cli.stuck import failing_task
from holdfast.contracts.run import RunResult
from holdfast.contracts.wording import ID, did_you_mean
from holdfast.engine import webhooks
from holdfast.engine.executions import Execution, describe, result_of
from holdfast.settings import settings
from holdfast.state.database import StoreUnavailable
from holdfast.state.opening import open_database
from holdfast.state.runs import Run, Runs

ANSWER = timedelta(seconds=5)
"""How long a worker may take to answer a query or an Update before the command gives up."""

COMPARED = 500
"""How many of the latest runs are searched for an id similar to an unknown one."""

LOOK_S = 0.1
"""How often a run is described while a workflow task of it waits for a worker."""

Handle = WorkflowHandle[Any, RunResult]


class NoAnswer(Exception):
    """The run cannot be queried now. The message says why."""


@asynccontextmanager
async def open_runs() -> AsyncIterator[Runs]:
    """The `runs` table. Raises StoreUnavailable."""
    db = await open_database(settings().store_url)
    try:
        yield Runs(db)
    finally:
        await db.close()


async def stored(workflow_id: str) -> Run | None:
    """The run's row in the store; None without a row or a store, when Temporal may still know the run."""
    try:
        async with open_runs() as runs:
            return await runs.by_workflow(workflow_id)
    except StoreUnavailable as error:
        words = filter(None, (str(error), settings().kept_by_the_stack("DATABASE_URL")))
        err.print(f"note: {'; '.join(words)}", style="dim", markup=False)
        return None


def link(client: Client, workflow_id: str, run_id: str = "") -> str:
    """The run's page in the Web UI; with run_id, the tab that shows open requests and how to answer them."""
    page = webhooks.page(settings().ui_url, client.namespace, workflow_id)
    return f"{page}/{run_id}/user-metadata" if run_id else page


@dataclass
class Known:
    """What is known about a run: Temporal's execution, the store's row, or both."""

    workflow_id: str
    handle: Handle
    execution: Execution | None
    row: Run | None

    @property
    def running(self) -> bool:
        """Whether it has not ended; it may be paused."""
        return self.execution is not None and self.execution.open

    @property
    def paused_words(self) -> str:
        return self.execution.paused_words if self.execution is not None else ""

    async def result(self) -> RunResult | None:
        """How the run ended; None when it has not, or its end is not recorded (it was terminated).

        Reads the store first: only the store has repairs that were made after the end.
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
    """What to do about an unknown run id: it may be a run's request key."""
    with suppress(StoreUnavailable):
        async with open_runs() as runs:
            if found := await runs.of_key(key):
                return f"did you mean {' or '.join(quote(row.workflow_id) for row in found)}?"
            like = did_you_mean(key, [row.workflow_id for row in await runs.recent(COMPARED)], ID)
            return f"`uv run starter.py list` shows those there are{like}"
    return "`uv run starter.py list` shows those there are"


async def find_running(client: Client, workflow_id: str) -> Known:
    """The run, if it is still open. Raises Refused when it has ended or is unknown."""
    known = await find(client, workflow_id)
    if known.running:
        return known
    result = await known.result()
    how = result.outcome.value if result else status_word(known.execution)
    raise Refused(f"{workflow_id} has ended ({how}): see `uv run starter.py result {quote(workflow_id)}`")


def status_word(execution: Execution | None) -> str:
    """Temporal's status of the execution, such as `running`, `paused` or `timed_out`."""
    return execution.status if execution is not None else "unknown"


async def temporal_result(handle: Handle) -> RunResult | None:
    """Waits for the end and returns the result; None when it has none: cancelled (see the store) or terminated."""
    try:
        return await result_of(handle)
    except WorkflowFailureError as error:
        cause = error.cause
        if isinstance(cause, ApplicationError) and cause.details:
            with suppress(ValidationError):
                return RunResult.model_validate(cause.details[0])
        return None


async def ask(client: Client, handle: Handle, query: str, kind: Any) -> Any:
    """Queries an open run. Raises NoAnswer.

    The query is sent only while no workflow task is pending. If a worker has to replay the run for a query, Temporal's
    Python SDK (1.35) applies a pending Signal out of order, and the run may never replay again.
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
        raise NoAnswer("it was paused just now") from None  # the SDK does not know the status that the server gives


NO_WORKER = "no worker answers: is one running for this task queue? (`uv run worker.py`)"


async def _answerable(client: Client, workflow_id: str) -> None:
    """Waits until no workflow task of the run is pending. Raises NoAnswer when the run cannot be queried.

    A run that makes progress all that time is queried anyway: it has a worker.
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
