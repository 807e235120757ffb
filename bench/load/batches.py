"""Runs the contract batch with workers that are killed, and counts what came of it from everybody's own records."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from signal import SIGKILL

from temporalio.client import Client, WorkflowFailureError

from bench.sweep.processes import ForkServer
from holdfast.cli.tally import count, received
from holdfast.contracts.run import RunResult
from holdfast.dev.simulation.scripted_model import ModelRecord
from holdfast.dev.stack import Child, Stack, without_ours
from holdfast.engine.client import DATA_CONVERTER
from holdfast.engine.starting import start_run
from holdfast.reliability.ledger import Entry, Ledger, State
from holdfast.state.database import Database
from holdfast.state.opening import open_database
from holdfast.state.runs import Runs
from tests.fixtures.stack import replays

STAGES = ("main", "read", "extract", "summarise")
TOOLS = ("read", "extract", "summarise", "save")


@dataclass(frozen=True)
class Kill:
    """Kills a worker of this stage when so many documents have been saved."""

    at: int
    stage: str


def kills(documents: int, workers: int, seed: int) -> list[Kill]:
    """Each worker of each stage once, spread at random over the run but its very end."""
    chance = random.Random(seed)
    last = max(1, int(0.85 * documents))
    return sorted(
        (Kill(chance.randint(1, last), stage) for stage in STAGES for _ in range(workers)), key=lambda kill: kill.at
    )


@dataclass(frozen=True)
class Outcome:
    """What one batch came to. `files`: the digest of each result by its name."""

    result: RunResult
    seconds: float
    killed: int
    files: dict[str, str]
    entries: list[Entry]
    repeated: int
    """Model calls that were sent again because the worker died before it had recorded the answer."""
    recorded: int
    """Model calls that were sent again although the answer was recorded: there must be none."""
    asked: int
    history: tuple[int, int]
    """Events and bytes of the batch's last execution."""

    @property
    def per_minute(self) -> float:
        return 60 * (self.result.items.ended if self.result.items else 0) / self.seconds


@dataclass
class Field:
    """A stack without workers, and the crew that works on it."""

    stack: Stack
    fork_server: ForkServer
    client: Client
    db: Database
    crew: dict[str, list[Child]] = field(default_factory=dict)

    @classmethod
    @asynccontextmanager
    async def open(cls, home: Path, store: str = "", think_s: float = 0.0) -> AsyncIterator[Field]:
        base = without_ours(os.environ) | ({"DATABASE_URL": store} if store else {})
        stack = Stack(home, base, durable=False, think_s=think_s)
        fork_server = ForkServer(stack.environment, stack.logs)
        try:
            await stack.start(workers=0)
            client = await Client.connect(stack.temporal_address, data_converter=DATA_CONVERTER)
            db = await open_database(stack.store_url)
            try:
                yield cls(stack, fork_server, client, db)
                await replays(stack)
            finally:
                await db.close()
        finally:
            fork_server.stop()
            stack.stop(0.0)

    async def hire(self, stage: str, number: int = 1, **environment: str) -> None:
        """More workers of a stage; an empty one serves everything."""
        arguments = ("--queue", stage) if stage else ()
        for _ in range(number):
            self.crew.setdefault(stage, []).append(await self.fork_server.worker(*arguments, **environment))

    def dismiss(self) -> None:
        for child in (each for group in self.crew.values() for each in group):
            child.signal(SIGKILL)
            child.wait(5)
        self.crew = {}

    async def batch(self, key: str, folder: Path, deaths: Sequence[Kill] = ()) -> Outcome:
        """Runs the batch over the folder. A killed worker is replaced at once."""
        workspace = self.stack.home / f"results-{key}"
        begun, left, hiring = time.monotonic(), list(deaths), set[asyncio.Task[None]]()
        started = await start_run(
            self.client,
            Runs(self.db),
            "contracts",
            {"folder": str(folder), "workspace": str(workspace)},
            task_queue="holdfast",
            request_key=key,
        )
        handle = self.client.get_workflow_handle(started.workflow_id, result_type=RunResult)
        ended = asyncio.create_task(handle.result())
        while not ended.done():
            saved = len(list((workspace / "documents").glob("*.json")))
            while left and left[0].at <= saved:
                stage = left.pop(0).stage
                self.crew[stage].pop(0).signal(SIGKILL)
                hiring.add(asyncio.create_task(self.hire(stage)))
            await asyncio.wait((ended,), timeout=0.05)
        seconds = time.monotonic() - begun
        await asyncio.gather(*hiring)
        try:
            result = ended.result()
        except WorkflowFailureError as error:
            raise RuntimeError(f"the batch failed: {error.cause}") from error
        info = (await handle.describe()).raw_description.workflow_execution_info
        entries = await self._entries(handle.id)
        calls = ModelRecord(self.stack.home / "model.db").calls(f"{handle.id}.")
        lines = count(received([], calls), [], entries)
        return Outcome(
            result,
            seconds,
            len(deaths) - len(left),
            digests(workspace),
            entries,
            sum(line.repeated for line in lines),
            sum(line.recorded for line in lines),
            len(calls),
            (info.history_length, info.history_size_bytes),
        )

    async def _entries(self, batch: str) -> list[Entry]:
        """The ledger of all documents of a batch."""
        ledger, found = Ledger(self.db, "load"), list[Entry]()
        for run in await Runs(self.db).recent(100_000, batch=batch):
            assert run.result is not None
            found += await ledger.entries(RunResult.model_validate_json(run.result).key_base)
        return found


def digests(workspace: Path) -> dict[str, str]:
    """The digest of every result by its name, without what the stages hand on."""
    files = (path for path in workspace.rglob("*") if path.is_file() and ".parts" not in path.parts)
    return {str(path.relative_to(workspace)): sha256(path.read_bytes()).hexdigest() for path in files}


def claims(calm: Outcome, killed: Outcome, deaths: int) -> dict[str, bool]:
    """What has to hold of a batch whose workers were killed, beside one that was left alone."""
    total, done = (killed.result.items.total, killed.result.items.done) if killed.result.items else (0, 0)
    acts = Counter((e.name, e.state) for e in killed.entries if e.kind == "tool")
    twice = [key for key, times in Counter(e.key for e in killed.entries).items() if times > 1]
    saved = sum(name.startswith("documents/") and name.endswith(".json") for name in killed.files)
    return {
        f"{killed.killed} of {deaths} workers were killed": killed.killed == deaths,
        f"{done} of {total} documents are done, as without kills": killed.result.items == calm.result.items,
        f"{saved} results in the workspace": saved == done,
        "in the ledger each stage of each of these once": not twice
        and all(acts[tool, State.DONE] >= done for tool in TOOLS)
        and acts["save", State.DONE] == done,
        f"{len(killed.files)} files, byte for byte those of the run without kills": killed.files == calm.files,
        f"{killed.recorded} of {killed.asked} model calls were repeated although recorded": killed.recorded == 0,
    }
