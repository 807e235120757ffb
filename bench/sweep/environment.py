"""What all cases stand on: one Temporal server, one scripted model, the stores, and the records of what happened."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle

from bench.sweep.cases import Evidence
from bench.sweep.processes import ForkServer
from holdfast.contracts.data import Json
from holdfast.contracts.run import RunResult
from holdfast.contracts.tool_call import key_base
from holdfast.dev.simulation.hospital import HospitalRecord
from holdfast.dev.simulation.scripted_model import ModelRecord
from holdfast.dev.stack import Child, Stack, without_ours
from holdfast.engine.client import DATA_CONVERTER
from holdfast.engine.starting import start_run
from holdfast.recovery.dead_letters import DeadLetters
from holdfast.reliability.breaker import Breaker
from holdfast.reliability.ledger import Ledger
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database
from holdfast.state.opening import open_database
from holdfast.state.runs import Runs
from holdfast.state.schema import migrate
from holdfast.testing.patience import PATIENCE_S

MODEL_RPM = "6000"
"""More than a sweep asks for: what is tried is a crash under a limit, not the wait for it."""


async def until(holds: Callable[[], object], seconds: float, what: str) -> None:
    """Waits for something that another process does. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        await asyncio.sleep(0.01)


@dataclass(frozen=True)
class Lane:
    """A hospital of one's own: the cases of a lane run one after another, so that a fault meets only its own case."""

    url: str
    record: HospitalRecord

    async def order(self, service: str, fault: Json) -> None:
        """Orders a fault (`holdfast.dev.simulation.service_faults.Fault`) from one of the hospital's services."""
        async with httpx2.AsyncClient(timeout=PATIENCE_S) as http:
            (await http.put(f"{self.url}/faults/{service}", json=fault)).raise_for_status()

    async def heal(self) -> None:
        async with httpx2.AsyncClient(timeout=PATIENCE_S) as http:
            (await http.delete(f"{self.url}/faults")).raise_for_status()


@dataclass
class Run:
    """One run on a task queue of its own, and its workers. Its tenant, named like the queue, has no other run."""

    servers: Servers
    store: str
    lane: Lane
    handle: WorkflowHandle[object, object]
    queue: str
    key_base: str
    workers: list[Child] = field(default_factory=list)

    async def worker(self, **environment: str) -> Child:
        """Starts a worker process on this run's queue; returns when it polls."""
        child = await self.servers.fork_server.worker(
            HOLDFAST_TASK_QUEUE=self.queue,
            DATABASE_URL=self.servers.urls[self.store],
            HOLDFAST_HOSPITAL_URL=self.lane.url,
            HOLDFAST_DRAIN_S="10",
            HOLDFAST_MODEL_RPM=MODEL_RPM,
            **environment,
        )
        self.workers.append(child)
        return child

    async def evidence(self) -> Evidence:
        """Reads all the records."""
        database, prefix = self.servers.databases[self.store], f"{self.key_base}/"
        row = await Runs(database).by_workflow(self.handle.id)
        breaker = Breaker(database, StoreClock(database))
        described = await self.handle.describe()
        assert described.status is not None
        return Evidence(
            status=WorkflowExecutionStatus(described.status).name,
            history=described.history_length,
            outcome=row.outcome if row else None,
            result=RunResult.model_validate_json(row.result) if row and row.result else None,
            ledger=await Ledger(database, "sweep").entries(self.key_base),
            letters=[each for each in await DeadLetters(database).find() if each.workflow_id == self.handle.id],
            breakers=[row for row in await breaker.rows() if row.target.endswith(f"@{self.queue}")],
            effects=self.lane.record.effects(prefix),
            requests=self.lane.record.requests(prefix),
            calls=self.servers.model.calls(prefix),
        )

    async def started_on(self, worker: Child, after: float) -> float | None:
        """Seconds from `after` (epoch) to the first task of this run that the worker started; None when it did not."""
        times = [when - after for when, identity in await self.starts() if identity == worker.pid and when >= after]
        return min(times, default=None)

    async def starts(self) -> list[tuple[float, int]]:
        """When (epoch) and by which process id each task in history was started."""
        found = []
        async for event in self.handle.fetch_history_events():
            for kind in ("workflow_task_started", "activity_task_started"):
                if event.HasField(attributes := f"{kind}_event_attributes"):  # type: ignore[arg-type]
                    identity: str = getattr(event, attributes).identity
                    at = event.event_time
                    found.append((at.seconds + at.nanos / 1e9, int(identity.partition("@")[0])))
        return found


class Servers:
    """Shared by all cases of a sweep."""

    def __init__(self, home: Path, urls: Mapping[str, str]) -> None:
        self.home = home
        self.urls = dict(urls)
        self.stack = Stack(home, {**without_ours(os.environ), "DATABASE_URL": next(iter(urls.values()))}, durable=False)
        self.fork_server = ForkServer(self.stack.environment, self.stack.logs)
        self.model = ModelRecord(self.stack.home / "model.db")
        self.databases: dict[str, Database] = {}
        self.client: Client
        self._lanes = 0
        self._runs = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, home: Path, urls: Mapping[str, str]) -> AsyncIterator[Servers]:
        """Starts the processes; ends all of them, frozen ones too, however the block is left."""
        servers = cls(home, urls)
        async with AsyncExitStack() as stack:
            stack.callback(servers.stack.stop, 0.0)
            stack.callback(servers.fork_server.stop)
            for name, url in servers.urls.items():
                await asyncio.to_thread(migrate, url)
                servers.databases[name] = await open_database(url)
                stack.push_async_callback(servers.databases[name].close)
            await servers.stack.start(workers=0)
            servers.client = await Client.connect(servers.stack.temporal_address, data_converter=DATA_CONVERTER)
            yield servers

    async def lane(self) -> Lane:
        """Starts one more hospital."""
        self._lanes += 1
        name = f"hospital-{self._lanes}"
        db = self.stack.home / f"{name}.db"
        command = [sys.executable, "-m", "holdfast.dev.simulation.hospital", "--port", "0", "--db", str(db)]
        child = Child(name, command, self.stack.environment, self.stack.logs / f"{name}.log")
        child.start()
        self.stack.services.append(child)
        await child.until(lambda: " ready on " in child.output())
        return Lane(child.output().split()[-1], HospitalRecord(db))

    @asynccontextmanager
    async def run(self, lane: Lane, store: str) -> AsyncIterator[Run]:
        """Starts a discharge run, which waits for a worker. Kills its workers at the end, and ends it if need be."""
        await lane.heal()
        self._runs += 1
        queue = f"sweep-{self._runs}"
        runs = Runs(self.databases[store])
        started = await start_run(
            self.client,
            runs,
            "discharge",
            {"patient_id": "pat-1"},
            task_queue=queue,
            request_key=f"{store}-{queue}",
            tenant=queue,
        )
        handle = self.client.get_workflow_handle(started.workflow_id)
        described = await handle.describe()
        run = Run(self, store, lane, handle, queue, key_base(handle.id, described.run_id))
        try:
            yield run
        finally:
            for child in run.workers:
                child.signal(signal.SIGKILL)
            for child in run.workers:
                child.wait(5)


async def strike(run: Run, worker: Child, number: signal.Signals) -> None:
    """Kills or freezes a worker from outside; returns when that has come about and, of a kill, the server knows it.

    The kernel closes a dead worker's connections and the server takes back its polls, which is done in milliseconds on
    a machine that is not busy. A task that was handed to a dead poll first waits for the workflow task's timeout.
    """
    server = psutil.Process(run.servers.stack.services[0].pid)
    ports = {c.laddr.port for c in psutil.Process(worker.pid).net_connections("tcp") if c.laddr}

    def ends() -> set[tuple[int, int]]:
        # With the server's own file descriptor: a port may be used again at once, by another worker.
        return {(c.fd, c.raddr.port) for c in server.net_connections("tcp") if c.raddr and c.raddr.port in ports}

    held = ends()
    worker.signal(number)
    if number is signal.SIGSTOP:
        await until(lambda: frozen(worker), 10, "the worker is frozen")
        return
    await until(lambda: not worker.alive, 10, "the worker is dead")
    await until(lambda: not held & ends(), 10, "the server has closed the dead worker's connections")


def frozen(child: Child) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(child.pid).status() == psutil.STATUS_STOPPED
    return False
