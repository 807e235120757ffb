"""Every run has to replay: a worker that takes it over knows nothing but its history.

`replay_all` fetches the histories of runs, of all they continued from and of all their children, and replays each on
today's code. A history that does not replay is a run that stands still for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowHistory
from temporalio.converter import DataConverter
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Replayer

from holdfast.engine.client import sandbox
from holdfast.engine.executions import describe, listed
from workflows.serving import WORKFLOWS

NO_TIME = "TMPRL1101"
"""Two seconds without a yield: this machine had no time for the workflow's thread."""


@dataclass(frozen=True)
class Execution:
    """One execution; the run id of a history is that of the first one before a reset."""

    workflow_id: str
    run_id: str
    history: WorkflowHistory = field(repr=False)


@dataclass(frozen=True)
class Unreplayable:
    """An execution whose history does not replay, and what the replay said."""

    workflow_id: str
    run_id: str
    error: str

    def __str__(self) -> str:
        return f"{self.workflow_id} (run {self.run_id}): {self.error}"


async def replay_all(client: Client, ids: Iterable[str]) -> list[Unreplayable]:
    """Replays the runs with these workflow ids; returns those that do not replay.

    Included are the executions that a run continues or was reset from, and its children. Ids that the server does not
    know and workflows that are not Holdfast's are left out.
    """
    return await replay(await fetch(client, ids), client.data_converter)


async def replay(executions: Sequence[Execution], converter: DataConverter) -> list[Unreplayable]:
    """Replays these executions one after another on one worker; returns those that do not replay."""
    replayer = Replayer(workflows=WORKFLOWS, workflow_runner=sandbox(strict=True), data_converter=converter)
    failed: list[Unreplayable] = []
    left = list(executions)
    while left:
        again: list[Execution] = []
        async with replayer.workflow_replay_iterator(_histories(left)) as results:
            number = 0
            async for result in results:
                one, error = left[number], result.replay_failure
                number += 1
                if error and NO_TIME in str(error):
                    again.append(one)
                elif error:
                    failed.append(Unreplayable(one.workflow_id, one.run_id, str(error)))
        left = again
    return failed


async def fetch(client: Client, ids: Iterable[str]) -> list[Execution]:
    """The executions of these workflow ids, those that they continue or were reset from, and their children."""
    ours = {each.__name__ for each in WORKFLOWS}
    found: dict[tuple[str, str], Execution] = {}
    left: deque[tuple[str, str]] = deque((id, "") for id in ids)
    while left:
        workflow_id, run_id = left.popleft()
        try:
            if not run_id:
                run_id = (await describe(client, workflow_id)).run_id
            if (workflow_id, run_id) in found:
                continue
            history = await client.get_workflow_handle(workflow_id, run_id=run_id).fetch_history()
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            continue
        if history.events[0].workflow_execution_started_event_attributes.workflow_type.name in ours:
            found[workflow_id, run_id] = Execution(workflow_id, run_id, history)
            left.extend(_related(history))
    # Without a task that has ended there is nothing to replay.
    return [each for each in found.values() if any(e.event_type == _TASK_DONE for e in each.history.events)]


async def ids_on(client: Client, query: str = "") -> list[str]:
    """The workflow ids that visibility lists for this query; of all executions by default."""
    return sorted({each.id async for each in listed(client, query)})


_TASK_DONE = EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED


async def _histories(of: Iterable[Execution]) -> AsyncIterator[WorkflowHistory]:
    for each in of:
        yield each.history


def _related(history: WorkflowHistory) -> list[tuple[str, str]]:
    """Workflow and run ids of the executions that this one came from, and of its children."""
    before = {history.events[0].workflow_execution_started_event_attributes.continued_execution_run_id}
    # A reset leaves this in the new run.
    before |= {event.workflow_task_failed_event_attributes.base_run_id for event in history.events}
    children = {e.start_child_workflow_execution_initiated_event_attributes.workflow_id for e in history.events}
    return [(history.workflow_id, run) for run in before - {""}] + [(child, "") for child in children - {""}]
