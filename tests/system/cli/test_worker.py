"""A worker drains on SIGTERM, and its exit status is its own."""

import asyncio
import signal
import subprocess
import sys
from uuid import uuid4

import httpx2
import pytest

from holdfast.contracts.run import RunResult
from holdfast.dev.simulation.hospital import HospitalRecord
from holdfast.dev.stack import ROOT, Stack
from holdfast.engine.client import DATA_CONVERTER, Client
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.proxy import Proxy
from tests.fixtures.stack import Cli, until


def worker(stack: Stack, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "worker.py")],
        env={**stack.environment, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_finishes_what_is_in_flight(stack: Stack, cli: Cli) -> None:
    queue, key = {"HOLDFAST_TASK_QUEUE": uuid4().hex}, uuid4().hex[:8]
    record = HospitalRecord(stack.home / "hospital.db")
    slow = {"mode": "slow", "seconds": 1.5, "times": 1}
    httpx2.put(f"{stack.hospital_url}/faults/records", json=slow, timeout=PATIENCE_S).raise_for_status()
    draining = worker(stack, **queue, HOLDFAST_DRAIN_S="60")
    run = f"discharge-{key}"
    assert cli("run", "discharge", "-i", '{"patient_id": "pat-1"}', "--id", key, **queue).returncode == 0
    until(lambda: any(each.status is None for each in record.requests(f"{run}/")))
    draining.send_signal(signal.SIGTERM)
    said, wrong = draining.communicate(timeout=PATIENCE_S)
    assert (draining.returncode, wrong) == (0, "")
    assert said.splitlines()[-1] == "worker draining"
    assert [each.status for each in record.requests(f"{run}/")] == [200, 200]  # each read was sent once, and answered
    cli("cancel", run)


def test_cannot_start(stack: Stack) -> None:
    for environment, says in (
        ({"TEMPORAL_ADDRESS": "127.0.0.1:1"}, "starter.py up"),
        ({"DATABASE_URL": "sqlite:////nowhere/holdfast.db"}, "starter.py migrate"),
        ({"HOLDFAST_FAULT": "kill:nowhere@*"}, "nowhere"),
    ):
        failed = worker(stack, **environment)
        _, said = failed.communicate(timeout=PATIENCE_S)
        assert failed.returncode == 2
        assert says in said
        assert "Traceback" not in said
        assert len(said.strip().splitlines()) == 1


def test_a_killed_workers_run_goes_on(stack: Stack, cli: Cli) -> None:
    """The least of it; the kill sweep goes through every point."""
    queue, key = {"HOLDFAST_TASK_QUEUE": uuid4().hex}, uuid4().hex[:8]
    doomed = worker(stack, **queue, HOLDFAST_FAULT="kill:effect-done@book_appointment")
    assert cli("run", "discharge", "-i", '{"patient_id": "pat-1"}', "--id", key, **queue).returncode == 0
    doomed.communicate(timeout=PATIENCE_S)
    assert doomed.returncode == -signal.SIGKILL
    heir = worker(stack, **queue)
    until(lambda: '"approval"' in cli("approvals", f"discharge-{key}", "--json").stdout)
    assert cli("approve", f"discharge-{key}").returncode == 0

    async def result() -> RunResult:
        client = await Client.connect(stack.temporal_address, data_converter=DATA_CONVERTER)
        return await client.get_workflow_handle(f"discharge-{key}", result_type=RunResult).result()

    assert asyncio.run(result()).outcome == "completed"
    booked = [e for e in HospitalRecord(stack.home / "hospital.db").effects(f"discharge-{key}/") if e.kind == "book"]
    assert len(booked) == 1
    heir.send_signal(signal.SIGTERM)
    assert heir.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("how", ["silent", "refusing", "going down at 1", "going down at 3", "going down at 5"])
def test_cannot_start_on_a_database_that_is_not_there(stack: Stack, silent: tuple[Proxy, str], how: str) -> None:
    """One line and status 2, at whatever connection of its start the database goes away."""
    proxy, url = silent
    if how == "refusing":
        proxy.refuse()
    if how == "silent":
        proxy.silence()
    starting = worker(stack, DATABASE_URL=url, HOLDFAST_STORE_TIMEOUT_S="2")
    if "going down" in how:
        until(lambda: proxy.taken >= int(how[-1]))
        proxy.refuse()
    _, said = starting.communicate(timeout=PATIENCE_S)
    assert starting.returncode == 2, said
    assert said.startswith("worker cannot start: ") and "Postgres store" in said
    assert len(said.strip().splitlines()) == 1, said
