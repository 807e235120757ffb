"""The people of the runs: they start them, answer late, twice and against themselves, look at the status all the while,
and cancel, terminate or reset a few.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import psycopg
from psycopg_pool import PoolTimeout
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import (
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.service import RPCError, RPCStatusCode

from bench.chaos.environment import QUEUE, Environment
from holdfast.contracts.data import Json
from holdfast.contracts.people import Approval
from holdfast.contracts.run import Phase
from holdfast.contracts.tool_call import key_base
from holdfast.engine.client import STATUS
from holdfast.engine.executions import unknown_run
from holdfast.engine.starting import start_run
from holdfast.state.database import StoreUnavailable
from holdfast.state.runs import Runs

STORE_ERRORS = (StoreUnavailable, psycopg.Error, sqlite3.Error, PoolTimeout)
RPC = timedelta(seconds=5)
LOOK_S = 1.0
"""How often a person looks whether a run asks something."""
SETTLED_S = 30.0
"""When a person looks into the hospital's record to see how a call ended: nothing is under way any more by then.
No simulated service is slower than 13 s, and no worker is frozen for more than 15 s.
"""
MESSAGE = {"text": "Please be brief. – ¡Gracias! 谢谢", "by": "ward"}
T = TypeVar("T")
Handle = WorkflowHandle[Any, Any]


class Gone(Exception):
    """The server knows no such run, or the run has ended."""


def end_if_cancelled() -> None:
    """Raises CancelledError in a task that was cancelled: the client may have told it as an RPC error."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def persist(attempt: Callable[[], Awaitable[T]]) -> T:
    """Tries until it works: the server, or the store, may be down for a while. Raises Gone when there is no run."""
    while True:
        try:
            return await attempt()
        except RPCError as error:
            if unknown_run(error):
                raise Gone(error.message) from None
            if error.status in (RPCStatusCode.INVALID_ARGUMENT, RPCStatusCode.FAILED_PRECONDITION):
                raise
        except (*STORE_ERRORS, OSError, RuntimeError):
            pass  # nothing is hidden: a run that never starts or ends is judged as stuck
        end_if_cancelled()
        await asyncio.sleep(0.5)


@dataclass
class Plan:
    """What people do with one run, decided by the seed before it starts."""

    delay_s: float
    """Mean time until an answer."""
    by_update: bool
    twice: bool
    against: bool
    """Two people answer at once, one yes and one no."""
    reject: bool
    message: bool
    end: str
    """cancel, terminate, reset, or nothing."""
    end_after_s: float

    @classmethod
    def of(cls, dice: random.Random) -> Plan:
        return cls(
            delay_s=dice.choice([0.0, 0.2, 2.0, 8.0]),
            by_update=dice.random() < 0.5,
            twice=dice.random() < 0.3,
            against=dice.random() < 0.05,
            reject=dice.random() < 0.04,
            message=dice.random() < 0.2,
            end=dice.choices(["", "cancel", "terminate", "reset"], [86, 6, 3, 5])[0],
            end_after_s=dice.uniform(0.5, 15.0),
        )


@dataclass
class Run:
    """A run that the program has started."""

    handle: Handle
    key_base: str
    plan: Plan
    answered: set[str] = field(default_factory=set)
    ended_at: float = 0.0
    began_at: float = 0.0


class People:
    def __init__(self, env: Environment, seed: int) -> None:
        self._env = env
        self._seed = seed
        self._dice = random.Random(f"{seed}-people")
        self.runs: list[Run] = []
        self.done: Counter[str] = Counter()
        self._answers: set[asyncio.Task[None]] = set()

    async def start(self, number: int) -> Run:
        """Starts the run of this number, once however often the store or the server fails meanwhile."""
        plan = Plan.of(random.Random(f"{self._seed}-{number}"))
        began = time.monotonic()
        started = await persist(
            lambda: start_run(
                self._env.client,
                Runs(self._env.db),
                "discharge",
                {"patient_id": f"pat-{number % 3 + 1}"},
                task_queue=QUEUE,
                request_key=f"chaos-{number}",
            )
        )
        handle = self._env.client.get_workflow_handle(started.workflow_id)
        described = await persist(handle.describe)
        first = described.raw_description.workflow_execution_info.first_run_id
        run = Run(handle, key_base(handle.id, first), plan, began_at=began)
        self.runs.append(run)
        return run

    async def attend(self, run: Run) -> None:
        """Answers what the run asks until it has ended, and does to it what its plan says."""
        begun = time.monotonic()
        while True:
            described = await persist(run.handle.describe)
            if described.raw_description.workflow_execution_info.status != 1:  # RUNNING
                break
            if run.plan.end and time.monotonic() - begun > run.plan.end_after_s:
                kind, run.plan.end = run.plan.end, ""
                self.done[kind] += 1
                with suppress(Gone, RPCError):
                    await getattr(self, f"_{kind}")(run)
            if run.plan.message and described.history_length > 20:
                run.plan.message = False
                self.done["message"] += 1
                with suppress(Gone):
                    await persist(lambda: run.handle.signal("message", MESSAGE, rpc_timeout=RPC))
            if described.typed_search_attributes.get(STATUS) == Phase.WAITING_HUMAN:
                for approval in await self._asked(run):
                    self._answer_soon(run, approval)
            end_if_cancelled()
            await asyncio.sleep(LOOK_S)
        run.ended_at = time.monotonic()

    async def watch(self) -> None:
        """Asks for the status of some run, again and again, as an open page does. A worker may be cold then."""
        while True:
            if alive := [run for run in self.runs if not run.ended_at]:
                run = self._dice.choice(alive)
                with suppress(RPCError, WorkflowQueryFailedError):
                    await run.handle.query("status", rpc_timeout=timedelta(seconds=2))
                self.done["query"] += 1
            end_if_cancelled()
            await asyncio.sleep(0.1)

    async def _asked(self, run: Run) -> list[Approval]:
        with suppress(RPCError, WorkflowQueryFailedError):
            return await run.handle.query("approvals", result_type=list[Approval], rpc_timeout=RPC)
        return []

    def _answer_soon(self, run: Run, approval: Approval) -> None:
        asked = f"{approval.id} {approval.asked_at}"  # after a Reset a run may ask the same again
        if asked in run.answered or "is deferred" in approval.why:
            return  # the platform tries a deferred call again
        if approval.kind == "outcome" and not approval.subject.startswith("notify"):
            return  # left to its desk; it holds up nothing
        run.answered.add(asked)
        task = asyncio.create_task(self._answer(run, approval))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, run: Run, approval: Approval) -> None:
        plan = run.plan
        base: Json = {"approval_id": approval.id, "approver": "dr.lee", "digest": approval.digest}
        if approval.kind == "outcome":
            await asyncio.sleep(SETTLED_S)
            effects = self._env.hospital_record.effects(approval.key)
            happened = any(effect.kind == "message" and effect.key == approval.key for effect in effects)
            decision = {**base, "verdict": "happened" if happened else "did_not", "comment": "looked into the record"}
            self.done[f"settled as {decision['verdict']}"] += 1
        else:
            await asyncio.sleep(self._dice.expovariate(1 / plan.delay_s) if plan.delay_s else 0.0)
            no = {**base, "verdict": "reject", "comment": "not today", "approver": "dr.no"}
            decision = no if plan.reject else {**base, "verdict": "approve"}
            if plan.against:
                self.done["against each other"] += 1
                await asyncio.gather(*(self._decide(run, each) for each in self._dice.sample([decision, no], 2)))
                return
        await self._decide(run, decision)
        if plan.twice:
            self.done["twice"] += 1
            await self._decide(run, decision)

    async def _decide(self, run: Run, decision: Json) -> None:
        self.done["decision"] += 1
        with suppress(Gone, RPCError):
            if run.plan.by_update:
                try:
                    await run.handle.execute_update("decide", decision, rpc_timeout=RPC)
                    return
                except (RPCError, WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError):
                    pass  # as a person would, who got no answer: the same again by a Signal
            await persist(lambda: run.handle.signal("decide", decision, rpc_timeout=RPC))

    # ------------------------------------------------------------ what ends a run, or takes it back

    async def _cancel(self, run: Run) -> None:
        await persist(lambda: run.handle.cancel(rpc_timeout=RPC))

    async def _terminate(self, run: Run) -> None:
        await persist(lambda: run.handle.terminate("chaos", rpc_timeout=RPC))

    async def _reset(self, run: Run) -> None:
        """Back to some workflow task that was completed: what was recorded since counts all the same."""
        history = await persist(run.handle.fetch_history)
        kind = EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED
        done = [event.event_id for event in history.events if event.event_type == kind]
        if not done:
            return
        request = ResetWorkflowExecutionRequest(
            namespace=self._env.client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=run.handle.id),
            reason="chaos",
            workflow_task_finish_event_id=self._dice.choice(done),
            request_id=f"{run.handle.id}-reset",
        )
        service = self._env.client.workflow_service
        await persist(lambda: service.reset_workflow_execution(request, timeout=RPC))
