"""Runs one case of the kill sweep on real processes, and the undisturbed runs that the cases are taken from."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
from temporalio.client import WorkflowExecutionStatus, WorkflowQueryFailedError
from temporalio.service import RPCError

from bench.sweep.cases import (
    BOUND_S,
    FLOW_FAULTS,
    MESSAGES,
    Case,
    Evidence,
    Flow,
    Mode,
    awakened,
    repeats,
    settled,
    violations,
    waiting,
)
from bench.sweep.environment import Lane, Run, Servers, frozen, strike, until
from holdfast.contracts.people import Approval
from holdfast.contracts.run import Phase
from holdfast.dev.stack import Child, StackFailed
from holdfast.engine.client import STATUS
from holdfast.reliability.crash_points import Point
from holdfast.testing.replay import replay_all

CASE_S = 150.0
"""No run takes this long, however it is hit."""
RECOVERY_S = 6.0
"""From a kill to the next task of the run on another worker."""
BEGIN_S = 2.0
"""The other worker is started at the kill; when the machine is so busy that it is ready late, it has this long."""
SIGNAL_S = 1.0
"""From the Signal that answers a parked run, whose worker was just killed, to its next task on another one."""
SENT_S = BOUND_S + 15.0
"""From its approval until the message to the providers has gone out, also when a worker is hit in the middle of it."""
SETTLED_S = BOUND_S + RECOVERY_S
"""From a kill until the call is settled that it left in doubt: the bound, and the recovery."""
LIVES_S = 1.5
"""How long a worker that woke may go on before it is told to stop."""


@dataclass
class Report:
    """What became of a case. Times in seconds; `recovery_s` is None where the run had nothing left to do."""

    case: Case
    store: str
    violations: list[str] = field(default_factory=list)
    outcome: str = ""
    effects: int = 0
    settled: int = 0
    """Outcomes that a person had to settle."""
    repeats: int = 0
    recovery_s: float | None = None
    ready_s: float | None = None
    """From the kill until the other worker, started then, polled."""
    settled_s: float | None = None
    """From the hit until the message to the providers was settled that the hit left in doubt."""
    seconds: float = 0.0
    log: str = ""
    """The end of the workers' logs, when something is wrong."""


async def traces(servers: Servers, lane: Lane, store: str) -> dict[Flow, list[str]]:
    """The crash points that the undisturbed runs pass, as `POINT@where`, in order."""
    found: dict[Flow, list[str]] = {}
    for flow in Flow:
        path = servers.home / f"trace-{flow}"
        async with asyncio.timeout(CASE_S), servers.run(lane, store) as run:
            await run.worker(HOLDFAST_FAULT_TRACE=str(path))
            people = await People.of(run, flow)
            await people.attend()
        lines = path.read_text().replace(f"@{run.queue}\n", "\n").splitlines()  # a breaker's target names its tenant
        found[flow] = lines + [waiting(kind) for kind in people.asked]
    return found


class People:
    """The physician who approves, and whoever looks into the hospital's record when an outcome is unknown.

    Needs no worker to go on: Temporal itself says whether a human is asked, only the requests are read by a query.
    """

    def __init__(self, run: Run, flow: Flow) -> None:
        self._run = run
        self._flow_fault = FLOW_FAULTS.get(flow)
        self._ordered = False
        self._answered: set[str] = set()
        self.asked: list[str] = []
        """Kinds of the requests that the run has waited for, once each."""

    @classmethod
    async def of(cls, run: Run, flow: Flow) -> People:
        """Orders what is to go wrong from the start."""
        people = cls(run, flow)
        if people._flow_fault and people._flow_fault.tool not in MESSAGES:
            await run.lane.order(people._flow_fault.service, people._flow_fault.fault)
        return people

    async def attend(self, leave: str = "") -> list[Approval]:
        """Answers until the run has ended, or waits for a request of the kind `leave`: returns those left open."""
        while (described := await self._run.handle.describe()).status is WorkflowExecutionStatus.RUNNING:
            if described.typed_search_attributes.get(STATUS) == Phase.WAITING_HUMAN:
                # What is put off, or left to the pharmacist, does not hold up the run and gets no answer.
                found = [each for each in await asked(self._run) if each.subject in MESSAGES]
                found = sorted(
                    (each for each in found if each.id not in self._answered), key=lambda a: MESSAGES.index(a.subject)
                )
                self.asked = list(dict.fromkeys([*self.asked, *(each.kind for each in found)]))
                if leave and any(each.kind == leave for each in found):
                    return found
                for each in found:
                    await self.answer(each)
            await asyncio.sleep(0.05)
        return []

    async def answer(self, approval: Approval) -> None:
        self._answered.add(approval.id)
        if approval.kind == "outcome":
            await settle(self._run, approval)
            return
        flow_fault = self._flow_fault
        if flow_fault and flow_fault.tool in MESSAGES:
            # One after the other, so that the fault meets the right one.
            if approval.subject == MESSAGES[1]:
                await until(lambda: sent(self._run), SENT_S, "message to the providers")
            if approval.subject == flow_fault.tool and not self._ordered:
                self._ordered = True
                await self._run.lane.order(flow_fault.service, flow_fault.fault)
        await approve(self._run, approval)


async def asked(run: Run) -> list[Approval]:
    """The open approvals; none while there is no worker to ask."""
    try:
        return await run.handle.query("approvals", result_type=list[Approval], rpc_timeout=timedelta(seconds=5))
    except (RPCError, WorkflowQueryFailedError):
        return []


async def approve(run: Run, approval: Approval) -> None:
    decision = {"approval_id": approval.id, "verdict": "approve", "approver": "dr.lee", "digest": approval.digest}
    await run.handle.signal("decide", decision)


async def settle(run: Run, approval: Approval) -> None:
    """Answers by the hospital's own record whether the message of this call was sent."""
    happened = any(e.kind == "message" and e.key == approval.key for e in run.lane.record.effects(approval.key))
    decision = {
        "approval_id": approval.id,
        "verdict": "happened" if happened else "did_not",
        "approver": "dr.lee",
        "comment": "it is in the record of messages" if happened else "it is not in the record of messages",
    }
    await run.handle.signal("decide", decision)


def sent(run: Run) -> bool:
    """Whether the hospital has sent a message of this run."""
    return any(effect.kind == "message" for effect in run.lane.record.effects(f"{run.key_base}/"))


async def try_case(servers: Servers, lane: Lane, store: str, case: Case) -> Report:
    """Hits a worker where the case says, lets another one take over, and judges what is on record afterwards."""
    report = Report(case, store)
    begun = time.monotonic()
    async with servers.run(lane, store) as run:
        try:
            async with asyncio.timeout(CASE_S):
                hit, at = await (_hit_waiting if case.point is Point.WAITING else _hit_armed)(run, case, report)
                found = await run.evidence()
                report.violations += violations(case, found)
                _settles(report, found, at)
                if case.mode is Mode.FREEZE:
                    await _wake(hit)
                    report.violations += awakened(found, found := await run.evidence())
                report.violations += map(str, await replay_all(servers.client, [run.handle.id]))
                _count(report, found)
        except (TimeoutError, StackFailed, RPCError) as error:
            report.violations.append(str(error) or f"not done within {CASE_S:.0f} s")
        if report.violations:
            report.log = "\n".join(f"--- {w.name}: {w.command[-1]}\n{w.output()[-3000:]}" for w in run.workers)
    report.seconds = time.monotonic() - begun
    return report


def _count(report: Report, found: Evidence) -> None:
    report.outcome = found.outcome or found.status
    report.effects = len(found.effects)
    report.settled = len(settled(found))
    report.repeats = repeats(found)


def _settles(report: Report, found: Evidence, at: float) -> None:
    """A call that the hit has left in doubt is settled not before the service's bound, and soon after it."""
    case = report.case
    if not case.in_doubt:
        return
    kind = "tool" if case.point is Point.RESERVED else "undo"
    row = next(e for e in found.ledger if (e.kind, e.name) == (kind, case.where))
    if row.settled_at is None:
        report.violations.append(f"{row.key} was never settled")
        return
    report.settled_s = row.settled_at - at
    # It was reserved a moment before the hit.
    if report.settled_s < BOUND_S - 1.0:
        report.violations.append(f"settled after {report.settled_s:.1f} s, earlier than its bound of {BOUND_S:g} s")
    if case.mode is Mode.KILL and report.settled_s > SETTLED_S:
        report.violations.append(f"settled after {report.settled_s:.1f} s, more than {SETTLED_S:g} s")


async def _hit_armed(run: Run, case: Case, report: Report) -> tuple[Child, float]:
    """The fault is in the worker: it dies or stops by itself at the point. The worker, and when it was hit."""
    people = await People.of(run, case.flow)
    life = asyncio.create_task(people.attend())
    try:
        worker = await run.worker(HOLDFAST_FAULT=case.fault(run.queue))
        down = (lambda: not worker.alive) if case.mode is Mode.KILL else (lambda: frozen(worker))
        await until(lambda: down() or life.done(), 60, f"worker hit at {case}")
        at = time.time()
        if life.done():
            report.violations.append("the point was not reached: the run ended without it")
        other = await run.worker()
        report.ready_s = time.time() - at
        await life
    finally:
        life.cancel()
    report.recovery_s = await run.started_on(other, at)
    if case.mode is Mode.KILL:
        limit = max(RECOVERY_S, report.ready_s + BEGIN_S)
        _within(report, limit)
        if case.point is Point.PROBING and (booked := _booked(run) - at) > limit + BEGIN_S:
            report.violations.append(f"the dead prober blocked the booking for {booked:.1f} s")
    return worker, at


async def _hit_waiting(run: Run, case: Case, report: Report) -> tuple[Child, float]:
    """Workflow code does no I/O, so the worker that has the waiting run in its cache is hit from outside."""
    people = await People.of(run, case.flow)
    await asyncio.gather(run.worker(), run.worker())
    left = await people.attend(leave=case.where)
    _, pid = max(await run.starts())
    (worker,) = [w for w in run.workers if w.pid == pid]
    (other,) = [w for w in run.workers if w.pid != pid]
    await strike(run, worker, signal.SIGKILL if case.mode is Mode.KILL else signal.SIGSTOP)
    at = time.time()
    for approval in left:
        await people.answer(approval)
    await people.attend()
    report.recovery_s = await run.started_on(other, at)
    if case.mode is Mode.KILL:
        _within(report, SIGNAL_S)
    return worker, at


def _booked(run: Run) -> float:
    """When the hospital booked the appointment (epoch); never, if it did not."""
    effects = run.lane.record.effects(f"{run.key_base}/")
    return next((effect.at for effect in effects if effect.kind == "book"), math.inf)


def _within(report: Report, limit: float) -> None:
    if report.recovery_s is None:
        report.violations.append("nothing of the run was done on the other worker")
    elif report.recovery_s > limit:
        report.violations.append(f"went on after {report.recovery_s:.1f} s, more than {limit:.1f} s")


async def _wake(worker: Child) -> None:
    """Thaws a worker, lets it live, and ends it: when it has drained it has finished what it was in the middle of."""
    process = psutil.Process(worker.pid)

    def used() -> Any:
        return sum(process.cpu_times()[:2])

    before = used()
    worker.signal(signal.SIGCONT)
    await until(lambda: used() > before, 10, "the frozen worker runs again")
    await asyncio.sleep(LIVES_S)
    worker.signal(signal.SIGTERM)
    await until(lambda: not worker.alive, 25, "the worker that woke drains")
    if "worker draining" not in worker.output():
        raise TimeoutError(worker.complaint("did not wake up well"))
