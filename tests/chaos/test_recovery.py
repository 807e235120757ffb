"""How soon a run goes on after `kill -9` of its worker, and what a crash costs it."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from bench.sweep.cases import Flow
from bench.sweep.environment import Lane, Run, Servers, strike, until
from bench.sweep.sweep import RECOVERY_S, SIGNAL_S, People, approve, asked
from holdfast.contracts.run import RunOutcome
from holdfast.reliability.crash_points import Point
from holdfast.reliability.ledger import Entry, Ledger, State

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def attend(run: Run) -> None:
    await (await People.of(run, Flow.APPROVED)).attend()


async def entry(run: Run, tool: str) -> Entry | None:
    entries = await Ledger(run.servers.databases[run.store], "test").entries(run.key_base)
    return next((e for e in entries if (e.kind, e.name) == ("tool", tool)), None)


async def test_work_in_flight_runs_on_another_worker_within_seconds(servers: Servers, lane: Lane) -> None:
    async with asyncio.timeout(60), servers.run(lane, "sqlite") as run:
        await lane.order("appointments", {"mode": "hang", "times": 1, "method": "POST"})
        await asyncio.gather(run.worker(), run.worker())
        life = asyncio.create_task(attend(run))
        await until(lambda: booking_requests(run) == 1, 20, "the booking is in flight")
        held = await entry(run, "book_appointment")
        assert held is not None
        (holder,) = [w for w in run.workers if w.pid == int(held.worker.rpartition("/")[2])]
        holder.signal(signal.SIGKILL)
        at = time.time()
        await until(lambda: booking_requests(run) == 2, 20, "the booking is tried again")
        assert time.time() - at <= RECOVERY_S
        await life
        booked = await entry(run, "book_appointment")
        assert booked is not None and (booked.state, booked.failures, booked.attempt) == (State.DONE, 0, 2)


async def test_parked_run_answers_a_signal_after_its_worker_was_killed(servers: Servers, lane: Lane) -> None:
    async with asyncio.timeout(60), servers.run(lane, "postgresql") as run:
        await asyncio.gather(run.worker(), run.worker())
        while not (approvals := await asked(run)):
            await asyncio.sleep(0.05)
        _, pid = max(await run.starts())
        (cached,) = [w for w in run.workers if w.pid == pid]
        (other,) = [w for w in run.workers if w.pid != pid]
        await strike(run, cached, signal.SIGKILL)
        at = time.time()
        await approve(run, approvals[0])
        await attend(run)
        answered = await run.started_on(other, at)
        assert answered is not None and answered <= SIGNAL_S
        assert (await run.evidence()).outcome == RunOutcome.COMPLETED


@pytest.mark.timeout(300)
async def test_ten_kills_at_one_step_use_up_none_of_its_retries(servers: Servers, lane: Lane) -> None:
    async with asyncio.timeout(240), servers.run(lane, "sqlite") as run:
        for _ in range(10):
            worker = await run.worker(HOLDFAST_FAULT=f"kill:{Point.RESERVED}@book_appointment")
            await until(lambda worker=worker: not worker.alive, 30, "the worker is killed at the booking")
        await run.worker()
        await attend(run)
        booked = await entry(run, "book_appointment")
        assert booked is not None and (booked.state, booked.failures, booked.attempt) == (State.DONE, 0, 11)
        assert (await run.evidence()).outcome == RunOutcome.COMPLETED
        assert [e.kind for e in lane.record.effects(booked.key)] == ["book"]


def booking_requests(run: Run) -> int:
    return sum(r.service == "appointments" for r in run.lane.record.requests(f"{run.key_base}/"))
