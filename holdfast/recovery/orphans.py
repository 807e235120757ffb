"""Orphans: runs that were terminated, timed out, or deleted from the server while their effects stand.

A workflow cannot catch its own termination. So the sweep finds its effects in the ledger, and another workflow undoes
them. A run that the server does not know counts as deleted only if it was started in this namespace: the store may
serve other namespaces too.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
)
from temporalio.service import RPCError, RPCStatusCode

from holdfast.contracts.recovery import Repair, Sweep
from holdfast.contracts.run import AgentInput, RunOutcome
from holdfast.contracts.tool_call import key_base
from holdfast.engine.executions import describe, unknown_run
from holdfast.state.database import Database
from holdfast.state.runs import Runs

SCHEDULE_ID = "holdfast-orphans"
WORKFLOW_ID = "orphan-sweep"
EVERY = timedelta(minutes=5)
AT_A_TIME = 20
MAX_FOUND = 100
"""Runs of one sweep; the next sweep finds the rest."""
_SUFFIX = len(key_base("", "x" * 36))

# `key_base` is the workflow's id, a slash and twelve characters.
_CANDIDATES = f"""
SELECT e.key_base, MAX(e.agent), MAX(r.agent), MAX(r.tenant), MAX(r.namespace)
FROM effects e LEFT JOIN runs r ON r.workflow_id = substr(e.key_base, 1, length(e.key_base) - {_SUFFIX})
WHERE e.kind = 'tool' AND e.effect <> 'read' AND r.ended_at IS NULL
    AND (e.state IN ('RESERVED', 'UNKNOWN', 'DONE') OR (e.state = 'FAILED' AND e.result IS NULL))
GROUP BY e.key_base HAVING MAX(e.reserved_at) < ? ORDER BY MAX(e.reserved_at)"""

_OVER = ("terminated", "timed_out")


async def find_orphans(db: Database, client: Client, grace_s: float) -> list[Repair]:
    """Runs with effects, no recorded end, and no workflow that could still undo them, as repairs without actions.

    grace_s: a run whose newest effect is younger, in seconds, is left alone: its last activity may still be running.
    """
    candidates = [
        (
            Repair(workflow_id=base[:-_SUFFIX], key_base=base, agent=told or agent or "", tenant=tenant or "default"),
            namespace is not None,
        )
        for base, agent, told, tenant, namespace in await db.all(_CANDIDATES, await db.time() - grace_s)
        if base[-_SUFFIX : -_SUFFIX + 1] == "/" and namespace in (None, client.namespace)
    ]
    found: list[Repair] = []
    # Every run that waits for a person is a candidate, so the server is asked about several at a time.
    for start in range(0, len(candidates), AT_A_TIME):
        chunk = candidates[start : start + AT_A_TIME]
        over = await asyncio.gather(*(is_over(client, each.workflow_id, each.key_base, ours) for each, ours in chunk))
        found += [each for (each, _), is_one in zip(chunk, over, strict=True) if is_one]
        if len(found) >= MAX_FOUND:
            break
    return found[:MAX_FOUND]


async def is_over(client: Client, workflow_id: str, base: str, ours: bool = True) -> bool:
    """Whether the run of this key base was terminated, timed out, or was deleted. Another key base is another run.

    ours: it was started in the client's namespace, so the server would know it if it still existed.
    """
    try:
        execution = await describe(client, workflow_id)
    except RPCError as error:
        if unknown_run(error):
            return ours
        raise
    return key_base(workflow_id, execution.first_run_id) != base or execution.status in _OVER


async def goes_on(client: Client, runs: Runs, base: str, own: str) -> bool:
    """Whether a Reset made another execution of this run that is open or ended well, and so builds on its effects.

    own: the execution that asks. Raises RPCError, StoreUnavailable.
    """
    workflow_id = base[:-_SUFFIX]
    try:
        execution = await describe(client, workflow_id)
    except RPCError as error:
        if unknown_run(error):
            return False
        raise
    if execution.run_id == own or key_base(workflow_id, execution.first_run_id) != base:
        return False
    if execution.open:
        return True
    run = await runs.by_workflow(workflow_id)
    outcome = RunOutcome(run.outcome) if run and run.outcome else RunOutcome.CANCELLED
    return execution.status == "completed" and not outcome.unwinds


async def webhook_of(client: Client, workflow_id: str) -> str:
    """The webhook address of a run; empty without one, and for a run that the server no longer knows."""
    try:
        async for event in client.get_workflow_handle(workflow_id).fetch_history_events(page_size=1):
            payloads = event.workflow_execution_started_event_attributes.input.payloads
            (given,) = await client.data_converter.decode(payloads, [AgentInput])
            return given.webhook
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
    return ""


# ------------------------------------------------------------------ the schedule


async def is_scheduled(client: Client) -> bool:
    try:
        await client.get_schedule_handle(SCHEDULE_ID).describe()
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return False
        raise
    return True


async def schedule(client: Client, task_queue: str) -> bool:
    """Creates the schedule that runs the sweep every five minutes. False when it exists."""
    made = Schedule(
        action=ScheduleActionStartWorkflow(
            "OrphanSweep",
            Sweep(),
            id=WORKFLOW_ID,
            task_queue=task_queue,
            static_summary="undoes what terminated runs left behind",
        ),
        spec=ScheduleSpec(intervals=[ScheduleIntervalSpec(every=EVERY)], jitter=timedelta(seconds=30)),
        # A missed sweep needs no catch-up: the next one finds the same runs.
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP, catchup_window=timedelta(minutes=1)),
    )
    try:
        await client.create_schedule(SCHEDULE_ID, made)
    except ScheduleAlreadyRunningError:
        return False
    return True
