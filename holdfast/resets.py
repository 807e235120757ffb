"""Runs whose history does not replay: their workflow task fails again and again, and no cancel gets through.

A run is reset to the workflow task whose commands differ, so that everything before it stays and everything after it
is done again, under the same keys: the ledger answers what is recorded. The server sends the Signals and Updates that
came since once more, and a cancel request is repeated. A Signal tells the run, is kept by the next reset, and so
counts the resets.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import ResetReapplyType, WorkflowTaskFailedCause
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflowservice.v1 import (
    GetWorkflowExecutionHistoryReverseRequest,
    ResetWorkflowExecutionRequest,
)
from temporalio.client import Client, WorkflowHistory
from temporalio.service import RPCError, RPCStatusCode

from holdfast.executions import OPEN, PROBLEMS, Execution, describe, listed

MAX_RESETS = 2
"""Resets of one execution by the sweep. What is stuck again after that is left to a person."""
MAX_STUCK = 20
"""Runs of one sweep; the next one finds the others."""
AT_A_TIME = 20
ATTEMPTS = 3
"""Failures in a row that make a run stuck: one alone may be a worker of another build in the middle of a deploy."""
RECENT = 100
"""Events among which the last failure is looked for: Signals may have come since."""
SIGNAL = "was_reset"

_TYPES = 'WorkflowType IN ("AgentWorkflow", "BatchWorkflow", "RepairWorkflow", "DeliveryWorkflow")'
_REPORTED = f'{PROBLEMS} IN ("cause=WorkflowTaskFailedCauseNonDeterministicError")'

Replays = Callable[[WorkflowHistory], Awaitable[bool]]
"""Whether a history, or the beginning of one, replays on the code of this worker."""


class WasReset(BaseModel):
    """The Signal `was_reset`. run_id: the execution that was stuck; `number` counts from 1."""

    run_id: str
    number: int = 1
    event_id: int = 0

    @property
    def words(self) -> str:
        return (
            f"the history did not replay, so the sweep has reset the run to event {self.event_id} (reset {self.number}"
            f" of {MAX_RESETS}): what was recorded is not done again"
        )


@dataclass(frozen=True)
class Mended:
    """What became of a run that is stuck. given_up: a person has to do something about it."""

    words: str
    given_up: bool = False


# ------------------------------------------------------------------ finding them


async def find_stuck(client: Client) -> list[Execution]:
    """Open runs whose workflow task fails for nondeterminism, at most `MAX_STUCK`. Raises RPCError."""
    found: list[Execution] = []
    async for chunk in _chunks(_candidates(client)):
        described = await asyncio.gather(*(_stuck(client, each) for each in chunk))
        found += [each for each in described if each is not None]
        if len(found) >= MAX_STUCK:
            break
    return found[:MAX_STUCK]


async def _candidates(client: Client) -> AsyncIterator[Execution]:
    """What the server reports; a server before 1.30 reports nothing, and every open run is looked at."""
    try:
        async for each in listed(client, f"{_TYPES} AND {OPEN} AND {_REPORTED}"):
            yield each
    except RPCError as error:
        if error.status is not RPCStatusCode.INVALID_ARGUMENT:
            raise
        async for each in listed(client, f"{_TYPES} AND {OPEN}"):
            yield each


async def _chunks(found: AsyncIterator[Execution]) -> AsyncIterator[list[Execution]]:
    chunk: list[Execution] = []
    async for each in found:
        chunk.append(each)
        if len(chunk) == AT_A_TIME:
            yield chunk
            chunk = []
    yield chunk


async def _stuck(client: Client, execution: Execution) -> Execution | None:
    """The execution as it is now, if it is stuck."""
    try:
        now = await describe(client, execution.id)
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        return None
    if not now.open or now.paused or now.task_attempt < ATTEMPTS:
        return None
    request = GetWorkflowExecutionHistoryReverseRequest(
        namespace=client.namespace,
        execution=WorkflowExecution(workflow_id=now.id, run_id=now.run_id),
        maximum_page_size=RECENT,
    )
    events = (await client.workflow_service.get_workflow_execution_history_reverse(request, retry=True)).history.events
    for event in events:
        if event.HasField("workflow_task_completed_event_attributes"):
            return None
        if event.HasField("workflow_task_failed_event_attributes"):
            cause = event.workflow_task_failed_event_attributes.cause
            broken = WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_NON_DETERMINISTIC_ERROR
            return now if cause == broken else None
    return None


# ------------------------------------------------------------------ resetting one


async def mend(client: Client, stuck: Execution, replays: Replays) -> Mended:
    """Resets a run that is stuck, or says why it does not. Idempotent: the same execution is reset once."""
    handle = client.get_workflow_handle(stuck.id, run_id=stuck.run_id)
    history = await handle.fetch_history()
    before = await _resets(client, history.events)
    done = [each for each in before if each.run_id != stuck.run_id]
    if len(done) >= MAX_RESETS:
        return Mended(f"its history does not replay, after {len(done)} resets by the sweep", given_up=True)
    event_id = await breaks_at(history, replays)
    if event_id is None:
        return Mended("its history replays on the sweep's worker: a worker of another build fails at it")
    told = next((each for each in before if each.run_id == stuck.run_id), None)
    if told is None:
        told = WasReset(run_id=stuck.run_id, number=len(done) + 1, event_id=event_id)
        # Before the reset, which keeps it: should this be cut off in between, the next sweep finds it and goes on.
        await handle.signal(SIGNAL, told)
    request = ResetWorkflowExecutionRequest(
        namespace=client.namespace,
        workflow_execution=WorkflowExecution(workflow_id=stuck.id, run_id=stuck.run_id),
        reason=told.words,
        workflow_task_finish_event_id=event_id,
        request_id=f"{SIGNAL}-{stuck.run_id}",
        # Nothing that people have said, and no cancel, is lost.
        reset_reapply_type=ResetReapplyType.RESET_REAPPLY_TYPE_ALL_ELIGIBLE,
    )
    fresh = await client.workflow_service.reset_workflow_execution(request, retry=True)
    if any(e.HasField("workflow_execution_cancel_requested_event_attributes") for e in history.events):
        # The server may leave a cancel request out of what it sends again.
        await client.get_workflow_handle(stuck.id, run_id=fresh.run_id).cancel()
    return Mended(f"reset to event {event_id} (reset {told.number} of {MAX_RESETS})")


async def _resets(client: Client, events: Sequence[HistoryEvent]) -> list[WasReset]:
    """The resets that a run has been told of, one for each execution that was stuck."""
    found: dict[str, WasReset] = {}
    for event in events:
        signaled = event.workflow_execution_signaled_event_attributes
        if event.HasField("workflow_execution_signaled_event_attributes") and signaled.signal_name == SIGNAL:
            values = await client.data_converter.decode(signaled.input.payloads)
            if told := told_of(values):
                found[told.run_id] = told
    return list(found.values())


def told_of(payload: Sequence[Any]) -> WasReset | None:
    """The Signal's payload; None for one of another shape."""
    with suppress(ValidationError, IndexError):
        return WasReset.model_validate(payload[0])
    return None


async def breaks_at(history: WorkflowHistory, replays: Replays) -> int | None:
    """The last workflow task that a reset can go back to with all before it replaying: its event id.

    The commands of that task are the first that differ. None when the whole history replays.
    """
    events = history.events
    tasks = [e.event_id for e in events if e.HasField("workflow_task_completed_event_attributes")]

    async def replays_up_to(number: int) -> bool:
        """With the commands of the tasks before that one."""
        end = tasks[number] if number < len(tasks) else events[-1].event_id + 1
        return await replays(WorkflowHistory(history.workflow_id, [e for e in events if e.event_id < end]))

    if not tasks or await replays_up_to(len(tasks)):
        return None
    good, bad = 0, len(tasks)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if await replays_up_to(middle) else (good, middle)
    return tasks[good]
