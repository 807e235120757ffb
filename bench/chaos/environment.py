"""The processes that the chaos program disturbs: Temporal, a store, the hospital, the model, and some workers.

Every worker reaches each of them over a proxy of its own (`tests.fixtures.proxy`), so that one worker can be cut off.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx2
import psutil
from temporalio.client import Client

from bench.sweep.processes import ForkServer
from holdfast.contracts.data import Json
from holdfast.dev.simulation.hospital import HospitalRecord
from holdfast.dev.simulation.scripted_model import ModelRecord
from holdfast.dev.stack import READY_S, Child, Stack, StackFailed, without_ours
from holdfast.engine.client import DATA_CONVERTER
from holdfast.state.database import Database
from holdfast.state.opening import open_database
from holdfast.state.schema import migrate
from tests.fixtures.proxy import Proxy
from tests.fixtures.store import STOP, PostgresForTests

QUEUE = "chaos"


@dataclass
class Worker:
    """A worker process and its proxies, by the name of what they lead to."""

    child: Child
    links: dict[str, Proxy] = field(default_factory=dict)

    def close(self) -> None:
        self.child.signal(signal.SIGKILL)
        for link in self.links.values():
            link.stop()


class Postgres:
    """A server of its own that can be killed, frozen and started again."""

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Postgres]:
        """Starts it; stops it however the block is left, or this process ends."""
        # In a folder of its own: the server gives up root's rights and then has to pass through all folders above.
        folder = Path(tempfile.gettempdir()) / f"holdfast-chaos-pg-{os.getpid()}"
        stopper = subprocess.Popen(["sh", "-c", STOP, str(folder)], stdin=subprocess.PIPE, start_new_session=True)
        try:
            yield cls(folder)
        finally:
            stopper.communicate()

    def __init__(self, home: Path) -> None:
        self._home = home
        self.url = PostgresForTests(home).create("chaos")

    @property
    def socket(self) -> Path:
        (folder,) = parse_qs(urlsplit(self.url).query)["host"]
        return next(Path(folder).glob(".s.PGSQL.*[0-9]"))

    def over(self, port: int) -> str:
        """The address of the same database over a link."""
        return f"postgresql://postgres@127.0.0.1:{port}/chaos"

    def kill(self) -> None:
        """As a crash: nothing is written back, and the next start recovers from the log. Blocks until it is gone."""
        processes = self._processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        # `start` would take a postmaster that has not died yet for a server that runs.
        psutil.wait_procs(processes, READY_S)

    def freeze(self) -> None:
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def thaw(self) -> None:
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def start(self) -> None:
        """Starts it again after a kill. Blocks until it answers."""
        deadline = time.monotonic() + READY_S
        while True:
            try:
                PostgresForTests(self._home)
            except AssertionError:
                # The package asserts that the pid file is whole and says "ready": on a busy machine it is not yet.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                return

    def _processes(self) -> list[psutil.Process]:
        with suppress(FileNotFoundError, psutil.NoSuchProcess, ValueError):
            postmaster = psutil.Process(int((self._home / "data" / "postmaster.pid").read_text().split()[0]))
            return [*postmaster.children(recursive=True), postmaster]
        return []


class Environment:
    """All processes of one chaos run over one store. `home` keeps their files and logs."""

    def __init__(self, home: Path, postgres: Postgres | None) -> None:
        self.postgres = postgres
        self.url = postgres.url if postgres else f"sqlite:///{home / 'store.db'}"
        self.stack = Stack(home, {**without_ours(os.environ), "DATABASE_URL": self.url, "HOLDFAST_TASK_QUEUE": QUEUE})
        self.temporal, self.hospital, self.model = self.stack.services
        self._fork_server = ForkServer(self.stack.environment, self.stack.logs)
        self.hospital_record = HospitalRecord(self.stack.home / "hospital.db")
        self.model_record = ModelRecord(self.stack.home / "model.db")
        self.workers: list[Worker] = []
        self.client: Client
        self.db: Database

    @classmethod
    @asynccontextmanager
    async def open(cls, home: Path, postgres: Postgres | None, workers: int) -> AsyncIterator[Environment]:
        """Starts everything; ends it, frozen processes too, however the block is left."""
        env = cls(home, postgres)
        async with AsyncExitStack() as stack:
            stack.callback(env.stack.stop, 0.0)
            stack.callback(env._fork_server.stop)
            stack.callback(env._close_workers)
            await asyncio.to_thread(migrate, env.url)
            await env.stack.start(workers=0)
            env.db = await open_database(env.url)
            stack.push_async_callback(env.db.close)
            env.client = await Client.connect(env.stack.temporal_address, data_converter=DATA_CONVERTER)
            await asyncio.gather(*(env.start_worker() for _ in range(workers)))
            yield env

    async def start_worker(self) -> None:
        """One more worker, on links of its own. Raises StackFailed when it does not come up."""
        ports = self.stack.ports
        links = {name: Proxy(("127.0.0.1", ports[name])) for name in ("temporal", "hospital", "model")}
        if self.postgres:
            links["store"] = Proxy(str(self.postgres.socket))
        try:
            child = await self._fork_server.worker(
                TEMPORAL_ADDRESS=f"127.0.0.1:{links['temporal'].port}",
                HOLDFAST_HOSPITAL_URL=f"http://127.0.0.1:{links['hospital'].port}",
                OPENAI_BASE_URL=f"http://127.0.0.1:{links['model'].port}/v1",
                DATABASE_URL=self.postgres.over(links["store"].port) if self.postgres else self.url,
                HOLDFAST_DRAIN_S="5",
                HOLDFAST_MODEL_RPM="60000",
                HOLDFAST_PARK_S="5",
            )
        except BaseException:
            for link in links.values():
                link.stop()
            raise
        self.workers.append(Worker(child, links))

    def _close_workers(self) -> None:
        for worker in self.workers:
            worker.close()

    async def replace(self, worker: Worker) -> None:
        """Another worker in the place of one that dies. Tries until one comes up: the store may be down as well."""
        if worker not in self.workers:
            return None  # another disturbance has hit it meanwhile
        self.workers.remove(worker)
        worker.close()
        while True:
            try:
                return await self.start_worker()
            except (StackFailed, StopIteration):
                await asyncio.sleep(0.5)

    async def restart(self, child: Child) -> None:
        """Kills a service and starts it again on its port and its files, until it comes up."""
        while True:
            child.signal(signal.SIGKILL)
            await asyncio.to_thread(child.wait, 10)
            child.start()
            try:
                return await self.stack.until_ready(child)
            except StackFailed:
                await asyncio.sleep(0.5)  # a server that finds its machine or its store too slow ends itself

    async def order(self, where: str, service: str, fault: Json | None) -> None:
        """Orders a fault from the hospital or the model; None takes all back. A process that is down is well."""
        url = f"http://127.0.0.1:{self.stack.ports[where]}/faults"
        with suppress(httpx2.HTTPError):
            async with httpx2.AsyncClient(timeout=5) as http:
                await (http.delete(url) if fault is None else http.put(f"{url}/{service}", json=fault))


async def until(holds: Callable[[], bool], seconds: float) -> bool:
    """Waits for something that another process does; whether it came about."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not holds():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True
