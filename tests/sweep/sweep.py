"""Runs one case of the kill sweep on real processes, and the undisturbed runs that the cases are taken from."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
from temporalio.client import WorkflowExecutionStatus, WorkflowQueryFailedError
from temporalio.service import RPCError

from holdfast.contracts import Approval, Phase
from holdfast.reliability.faults import Point
from holdfast.stack import Child, StackFailed
from holdfast.temporal import STATUS
from tests.sweep.cases import ASKED, Case, Evidence, Flow, Mode, awakened, repeats, unknown, violations
from tests.sweep.ground import Ground, Lane, Run, frozen, strike, until

CASE_S = 150.0
"""No run takes this long, however it is hit."""
RECOVERY_S = 6.0
"""From a kill to the next task of the run on another worker."""
BEGIN_S = 2.0
"""The other worker is started at the kill; when the machine is so busy that it is ready late, it has this long."""
SIGNAL_S = 1.0
"""From the Signal that answers a parked run, whose worker was just killed, to its next task on another one."""
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
    unknown: list[str] = field(default_factory=list)
    repeats: int = 0
    recovery_s: float | None = None
    ready_s: float | None = None
    """From the kill until the other worker, started then, polled."""
    seconds: float = 0.0
    log: str = ""
    """The end of the workers' logs, when something is wrong."""


async def traces(ground: Ground, lane: Lane, store: str) -> dict[Flow, list[str]]:
    """The crash points that the two undisturbed runs pass, as `POINT@where`, in order."""
    found: dict[Flow, list[str]] = {}
    for flow in Flow:
        path = ground.home / f"trace-{flow}"
        async with asyncio.timeout(CASE_S), ground.run(lane, store) as run:
            await run.worker(HOLDFAST_FAULT_TRACE=str(path))
            asked = await attend(run, flow)
        found[flow] = path.read_text().splitlines() + ([ASKED] if asked else [])
    return found


async def attend(run: Run, flow: Flow) -> int:
    """Plays the physician until the run has ended; how many approvals were asked for.

    Needs no worker to go on: Temporal itself says whether a human is asked, only the request is read by a query.
    """
    answered: set[str] = set()
    while (described := await run.handle.describe()).status is WorkflowExecutionStatus.RUNNING:
        if described.typed_search_attributes.get(STATUS) == Phase.WAITING_HUMAN:
            # The providers first: in a failing run their message is out when the patient's is refused.
            for approval in sorted(await asked(run), key=lambda a: a.subject, reverse=True):
                if approval.id in answered:
                    continue
                if flow is Flow.FAILED and approval.subject == "notify_patient":
                    await until(lambda: sent(run), 20, "message to the providers")
                    await run.lane.fail_once()
                await approve(run, approval)
                answered.add(approval.id)
        await asyncio.sleep(0.05)
    return len(answered)


async def asked(run: Run) -> list[Approval]:
    """The open approvals; none while there is no worker to ask."""
    try:
        return await run.handle.query("approvals", result_type=list[Approval], rpc_timeout=timedelta(seconds=5))
    except (RPCError, WorkflowQueryFailedError):
        return []


async def approve(run: Run, approval: Approval) -> None:
    decision = {"approval_id": approval.id, "verdict": "approve", "approver": "dr.lee", "digest": approval.digest}
    await run.handle.signal("decide", decision)


def sent(run: Run) -> bool:
    """Whether the hospital has sent a message of this run."""
    return any(effect.kind == "message" for effect in run.lane.record.effects(f"{run.key_base}/"))


async def try_case(ground: Ground, lane: Lane, store: str, case: Case) -> Report:
    """Hits a worker where the case says, lets another one take over, and judges what is on record afterwards."""
    report = Report(case, store)
    begun = time.monotonic()
    async with ground.run(lane, store) as run:
        try:
            async with asyncio.timeout(CASE_S):
                hit = await (_hit_waiting if case.point is Point.WAITING else _hit_armed)(run, case, report)
                found = await run.evidence()
                report.violations += violations(case, found)
                if case.mode is Mode.FREEZE:
                    await _wake(hit)
                    report.violations += awakened(found, found := await run.evidence())
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
    report.unknown = unknown(found)
    report.repeats = repeats(found)


async def _hit_armed(run: Run, case: Case, report: Report) -> Child:
    """The fault is in the worker: it dies or stops by itself at the point."""
    life = asyncio.create_task(attend(run, case.flow))
    try:
        worker = await run.worker(HOLDFAST_FAULT=case.fault)
        down = (lambda: not worker.alive) if case.mode is Mode.KILL else (lambda: frozen(worker))
        await until(lambda: down() or life.done(), 60, f"worker hit at {case.fault}")
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
        _within(report, max(RECOVERY_S, report.ready_s + BEGIN_S))
    return worker


async def _hit_waiting(run: Run, case: Case, report: Report) -> Child:
    """Workflow code does no I/O, so the worker that has the waiting run in its cache is hit from outside."""
    await asyncio.gather(run.worker(), run.worker())
    while not (approvals := await asked(run)):
        await asyncio.sleep(0.05)
    _, pid = max(await run.starts())
    (worker,) = [w for w in run.workers if w.pid == pid]
    (other,) = [w for w in run.workers if w.pid != pid]
    await strike(run, worker, signal.SIGKILL if case.mode is Mode.KILL else signal.SIGSTOP)
    at = time.time()
    for approval in approvals:
        await approve(run, approval)
    await attend(run, case.flow)
    report.recovery_s = await run.started_on(other, at)
    if case.mode is Mode.KILL:
        _within(report, SIGNAL_S)
    return worker


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
