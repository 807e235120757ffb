"""What goes wrong: a seeded stream of disturbances, each with its end, so that nothing stays broken for good."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress

from bench.chaos.environment import Environment, Worker
from holdfast.contracts.data import Json
from holdfast.dev.simulation.hospital import SERVICES

LONGEST_S = 15.0
"""No freeze and no cut lasts longer."""
PAUSE_S = 3.0
"""Mean time between two disturbances. They overlap."""

_Disturb = Callable[[], Coroutine[None, None, None]]


class Disturbances:
    """Disturbs an environment until `stop` is set, and counts what it did."""

    def __init__(self, env: Environment, seed: int) -> None:
        self._env = env
        self._random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.log: list[str] = []
        self.released: list[float] = []
        """When links to the model that had held back requests passed them on, as Unix time."""
        self._under_way: set[asyncio.Task[None]] = set()
        self._busy: set[str] = set()
        """What is being restarted or frozen: one at a time for each."""
        kinds: list[tuple[int, str, _Disturb]] = [
            (6, "kill worker", self._kill_worker),
            (4, "freeze worker", self._freeze_worker),
            (4, "cut worker off", self._cut_off),
            (2, "kill temporal", self._kill_temporal),
            (2, "freeze temporal", self._freeze_temporal),
            (2, "kill hospital", self._kill_hospital),
            (8, "service fault", self._service_fault),
            (3, "model fault", self._model_fault),
        ]
        if env.postgres:
            kinds += [(2, "kill postgres", self._kill_postgres), (2, "freeze postgres", self._freeze_postgres)]
        self._kinds = kinds

    async def run(self, stop: asyncio.Event) -> None:
        """Disturbs until `stop` is set; then waits until the last disturbance is over."""
        begun = asyncio.get_running_loop().time()
        while not stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), self._random.expovariate(1 / PAUSE_S))
                break
            _, name, disturb = self._random.choices(self._kinds, [weight for weight, _, _ in self._kinds])[0]
            self.done[name] += 1
            self.log.append(f"{asyncio.get_running_loop().time() - begun:7.1f} s  {name}")
            self._under_way.add(asyncio.create_task(disturb(), name=name))
            for task in [task for task in self._under_way if task.done()]:
                self._under_way.discard(task)
                task.result()
        await asyncio.gather(*self._under_way)
        for where in ("hospital", "model"):
            await self._env.order(where, "", None)

    async def _kill_worker(self) -> None:
        if worker := self._some_worker():
            await self._env.replace(worker)

    async def _freeze_worker(self) -> None:
        if worker := self._some_worker():
            worker.child.signal(signal.SIGSTOP)
            await self._while()
            worker.child.signal(signal.SIGCONT)
            # One whose work went to another may end itself, or be of no use: in production it would be replaced too.
            if not worker.child.alive:
                await self._env.replace(worker)

    async def _cut_off(self) -> None:
        if worker := self._some_worker():
            links = list(worker.links.values())
            chosen = links if self._random.random() < 0.5 else [self._random.choice(links)]
            how = self._random.choice(["hold", "silence", "cut"])
            for link in chosen:
                getattr(link, how)()
            await self._while()
            for link in chosen if worker in self._env.workers else ():
                link.talk()
            if how == "hold" and worker.links["model"] in chosen:
                self.released.append(time.time())

    async def _kill_temporal(self) -> None:
        async with self._alone("temporal") as free:
            if free:
                await self._env.restart(self._env.temporal)

    async def _freeze_temporal(self) -> None:
        async with self._alone("temporal") as free:
            if free:
                self._env.temporal.signal(signal.SIGSTOP)
                await self._while()
                self._env.temporal.signal(signal.SIGCONT)

    async def _kill_hospital(self) -> None:
        async with self._alone("hospital") as free:
            if free:
                self._env.hospital.signal(signal.SIGKILL)
                await self._while()
                await self._env.restart(self._env.hospital)

    async def _kill_postgres(self) -> None:
        postgres = self._env.postgres
        assert postgres is not None
        async with self._alone("postgres") as free:
            if free:
                await asyncio.to_thread(postgres.kill)
                await asyncio.sleep(self._random.uniform(0.2, 3.0))
                await asyncio.to_thread(postgres.start)

    async def _freeze_postgres(self) -> None:
        postgres = self._env.postgres
        assert postgres is not None
        async with self._alone("postgres") as free:
            if free:
                await asyncio.to_thread(postgres.freeze)
                await self._while()
                await asyncio.to_thread(postgres.thaw)

    async def _service_fault(self) -> None:
        await self._fault("hospital", self._random.choice(SERVICES))

    async def _model_fault(self) -> None:
        await self._fault("model", "model")

    async def _fault(self, where: str, service: str) -> None:
        faults: list[Json] = [
            {"mode": "fail", "status": self._random.choice([500, 502, 503, 429]), "times": self._random.randint(1, 8)},
            {"mode": "slow", "seconds": self._random.uniform(1.0, 13.0), "times": self._random.randint(1, 5)},
            {"mode": "hang", "times": self._random.randint(1, 3)},
            {"mode": "drop", "times": self._random.randint(1, 3)},
        ]
        await self._env.order(where, service, self._random.choice(faults))

    def _some_worker(self) -> Worker | None:
        return self._random.choice(self._env.workers) if self._env.workers else None

    async def _while(self) -> None:
        await asyncio.sleep(self._random.uniform(0.5, LONGEST_S))

    @asynccontextmanager
    async def _alone(self, what: str) -> AsyncIterator[bool]:
        """Whether nothing else is being done to this process; a second disturbance of it would not be seen."""
        if what in self._busy:
            yield False
            return
        self._busy.add(what)
        try:
            yield True
        finally:
            self._busy.discard(what)
