"""Resets stuck runs: their history does not replay, so their workflow task fails again and again, and no cancel works.

The sweep resets a run to the workflow task whose commands differ. Everything before that task stays. Everything after
it is done again under the same keys: the ledger answers what is recorded. The server sends the later Signals again. It
does not repeat a cancel request, so the sweep does. The server could repeat the Updates, but Temporal's Python SDK
(1.35) replays such an Update after the Signals of its workflow task even when it came before them, and the run would be
stuck again. So the sweep sends each Update as the Signal of the same name instead.

A Signal tells the run of the reset. The next reset keeps that Signal, so it counts the resets. Each run has an activity
of its own, which Temporal retries after a crash.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import ResetReapplyExcludeType, ResetReapplyType, WorkflowTaskFailedCause
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.update.v1 import Request
from temporalio.api.workflowservice.v1 import (
    GetWorkflowExecutionHistoryReverseRequest,
    ResetWorkflowExecutionRequest,
    SignalWorkflowExecutionRequest,
)
from temporalio.client import Client, WorkflowHistory
from temporalio.service import RPCError, RPCStatusCode

from holdfast.contracts.people import DecisionReply
from holdfast.engine.encryption import PayloadUnreadable
from holdfast.engine.executions import OPEN, PROBLEMS, Execution, describe, listed, unknown_run

MAX_RESETS = 2
"""Resets of one run by the sweep. A run that is stuck again after that is left to a person."""
MAX_STUCK = 20
"""Runs of one sweep; the next sweep finds the rest."""
AT_A_TIME = 20
ATTEMPTS = 3
"""A run is stuck after this many failures in a row. One alone may come from another build during a deploy."""
RECENT = 100
"""The last events, among which the last failure is searched: Signals may have come since."""
SIGNAL = "was_reset"
ENDED = "has ended meanwhile"

_TYPES = 'WorkflowType IN ("AgentWorkflow", "BatchWorkflow", "RepairWorkflow", "DeliveryWorkflow")'
_REPORTED = f'{PROBLEMS} IN ("cause=WorkflowTaskFailedCauseNonDeterministicError")'


class Stuck(BaseModel):
    """Input of the activity `mend`: the execution that is stuck."""

    workflow_id: str
    run_id: str


Replays = Callable[[WorkflowHistory], Awaitable[bool]]
"""Whether a history, or its beginning, replays on the code of this worker."""


class WasReset(BaseModel):
    """The Signal `was_reset`. run_id: the execution that was stuck; `number` counts from 1."""

    run_id: str
    number: int = 1
    event_id: int = 0
    accepted: list[str] = []
    """The requests whose decision the run had taken by an Update. After the reset that decision comes last, so the run
    has to know that it counts, and not a contrary Signal that came later."""

    @property
    def words(self) -> str:
        return (
            f"the history did not replay, so the sweep has reset the run to event {self.event_id} (reset {self.number}"
            f" of {MAX_RESETS}): what was recorded is not done again"
        )


@dataclass(frozen=True)
class Mended:
    """What the sweep did with a stuck run. given_up: a person has to act."""

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
    """The open runs that the server reports as stuck; all open runs on a server before 1.30, which reports none."""
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
    """The current state of the execution, if it is stuck."""
    try:
        now = await describe(client, execution.id)
    except RPCError as error:
        if not unknown_run(error):
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
    """Resets a stuck run, or returns why it does not. Idempotent: an execution is reset once, and this completes what
    an earlier attempt left undone. Raises RPCError.
    """
    handle = client.get_workflow_handle(stuck.id, run_id=stuck.run_id)
    history = await handle.fetch_history()
    before = await _resets(client, history.events)
    told = next((each for each in before if each.run_id == stuck.run_id), None)
    current = await describe(client, stuck.id)
    if current.run_id == stuck.run_id and current.open:
        done = [each for each in before if each.run_id != stuck.run_id]
        if len(done) >= MAX_RESETS:
            return Mended(f"its history does not replay, after {len(done)} resets by the sweep", given_up=True)
        event_id = await breaks_at(history, replays)
        if event_id is None:
            return Mended("its history replays on the sweep's worker: a worker of another build fails at it")
        if told is None:
            told = WasReset(run_id=stuck.run_id, number=len(done) + 1, event_id=event_id)
            for id, request in _updates(history.events, event_id):
                if not await _refused(client, history.events, id):
                    await _as_signal(client, stuck, id, request)
                    told.accepted += await _decided_by(client, request)
            # Before the reset, which keeps the Signal: after a crash in between, the next sweep finds it and goes on.
            await handle.signal(SIGNAL, told)
        reset = ResetWorkflowExecutionRequest(
            namespace=client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=stuck.id, run_id=stuck.run_id),
            reason=told.words,
            workflow_task_finish_event_id=event_id,
            request_id=f"{SIGNAL}-{stuck.run_id}",
            # No answer or message is lost: the Updates were sent as Signals.
            reset_reapply_type=ResetReapplyType.RESET_REAPPLY_TYPE_ALL_ELIGIBLE,
            reset_reapply_exclude_types=[ResetReapplyExcludeType.RESET_REAPPLY_EXCLUDE_TYPE_UPDATE],
        )
        await client.workflow_service.reset_workflow_execution(reset, retry=True)
    elif told is None or current.run_id == stuck.run_id or current.first_run_id != stuck.first_run_id:
        return Mended(ENDED)
    await _cancel_again(client, stuck)
    return Mended(f"reset to event {told.event_id} (reset {told.number} of {MAX_RESETS})")


def _updates(events: Sequence[HistoryEvent], event_id: int) -> Iterator[tuple[str, Request]]:
    """The Updates since that event, with their ids. A stuck run accepts no new ones."""
    for event in events:
        if event.event_id <= event_id:
            continue
        if event.HasField("workflow_execution_update_admitted_event_attributes"):  # as after a reset by hand
            admitted = event.workflow_execution_update_admitted_event_attributes.request
            yield admitted.meta.update_id, admitted
        elif event.HasField("workflow_execution_update_accepted_event_attributes"):
            accepted = event.workflow_execution_update_accepted_event_attributes.accepted_request
            if accepted.input.name:  # without a name it was admitted before, and is yielded above
                yield accepted.meta.update_id, accepted


async def _refused(client: Client, events: Sequence[HistoryEvent], update_id: str) -> bool:
    """Whether the run has refused this Update."""
    for event in events:
        completed = event.workflow_execution_update_completed_event_attributes
        if completed.meta.update_id == update_id and completed.outcome.HasField("success"):
            with suppress(ValidationError, PayloadUnreadable):
                (reply,) = await client.data_converter.decode(completed.outcome.success.payloads, [DecisionReply])
                return not reply.accepted
    return False


async def _decided_by(client: Client, update: Request) -> list[str]:
    """The request that this Update answers, if it is a decision."""
    if update.input.name != "decide":
        return []
    with suppress(PayloadUnreadable):
        values = await client.data_converter.decode(update.input.args.payloads)
        name = values[0].get("approval_id") if values and isinstance(values[0], dict) else None
        return [name] if isinstance(name, str) else []
    return []


async def _as_signal(client: Client, stuck: Execution, update_id: str, update: Request) -> None:
    """Sends an Update as the Signal of the same name, payload unchanged. Idempotent: the request id is fixed."""
    signal = SignalWorkflowExecutionRequest(
        namespace=client.namespace,
        workflow_execution=WorkflowExecution(workflow_id=stuck.id, run_id=stuck.run_id),
        signal_name=update.input.name,
        input=update.input.args,
        header=update.input.header,
        request_id=f"{SIGNAL}-{update_id}",
    )
    await client.workflow_service.signal_workflow_execution(signal, retry=True)


async def _cancel_again(client: Client, stuck: Execution) -> None:
    """Repeats the cancel request of an execution that was reset, which the server does not. Idempotent.

    Reads the history once more: the request may have come while the reset was prepared.
    """
    async for event in client.get_workflow_handle(stuck.id, run_id=stuck.run_id).fetch_history_events():
        if event.HasField("workflow_execution_cancel_requested_event_attributes"):
            reason = event.workflow_execution_cancel_requested_event_attributes.cause
            run = client.get_workflow_handle(stuck.id, first_execution_run_id=stuck.first_run_id)
            try:
                await run.cancel(reason=reason)
            except RPCError as error:
                if not unknown_run(error):  # it has ended meanwhile
                    raise
            return


async def _resets(client: Client, events: Sequence[HistoryEvent]) -> list[WasReset]:
    """The `was_reset` Signals of a run, one for each execution that was stuck."""
    found: dict[str, WasReset] = {}
    for event in events:
        signaled = event.workflow_execution_signaled_event_attributes
        if event.HasField("workflow_execution_signaled_event_attributes") and signaled.signal_name == SIGNAL:
            values = await client.data_converter.decode(signaled.input.payloads)
            if told := told_of(values):
                found[told.run_id] = told
    return list(found.values())


def told_of(payload: Sequence[Any]) -> WasReset | None:
    """The payload of the Signal `was_reset`; None if it has another shape."""
    with suppress(ValidationError, IndexError):
        return WasReset.model_validate(payload[0])
    return None


async def breaks_at(history: WorkflowHistory, replays: Replays) -> int | None:
    """Event id of the last workflow task to reset to such that everything before it replays.

    The commands of that task are the first that differ. None when the whole history replays.
    """
    events = history.events
    tasks = [e.event_id for e in events if e.HasField("workflow_task_completed_event_attributes")]

    async def replays_up_to(number: int) -> bool:
        """Whether the history replays with the commands of the tasks before task `number`."""
        end = tasks[number] if number < len(tasks) else events[-1].event_id + 1
        return await replays(WorkflowHistory(history.workflow_id, [e for e in events if e.event_id < end]))

    if not tasks or await replays_up_to(len(tasks)):
        return None
    good, bad = 0, len(tasks)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if await replays_up_to(middle) else (good, middle)
    return tasks[good]
