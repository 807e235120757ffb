"""One chaos run over one store: runs are started and answered while everything fails, then all is judged."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from temporalio.client import WorkflowExecutionStatus
from temporalio.service import RPCError

from bench.chaos.disturbances import Disturbances
from bench.chaos.environment import Environment, Postgres
from bench.chaos.judge import Record, Violation, has_effects, judge
from bench.chaos.people import People, Run
from holdfast.contracts.run import RunResult
from holdfast.recovery.dead_letters import DeadLetters
from holdfast.recovery.orphans import SCHEDULE_ID
from holdfast.reliability.ledger import Ledger
from holdfast.state.runs import Runs
from holdfast.testing.replay import replay_all

WORKERS = 3
CALM_S = 420.0
"""How long runs may take to end once nothing is disturbed any more: a call's longest pause, a breaker, a sweep."""

Progress = Callable[[str, int, int], None]
"""Gets the store, and how many runs have ended of how many."""


@dataclass
class Report:
    store: str
    seed: int
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    disturbances: Counter[str] = field(default_factory=Counter)
    people: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    """What was disturbed, and when."""
    calls_repeated: int = 0
    """Model calls beyond the first of their key: a worker died before the answer was recorded."""
    slowest_s: float = 0.0

    @property
    def runs(self) -> int:
        return sum(self.outcomes.values())


async def chaos(
    home: Path, postgres: Postgres | None, seed: int, runs: int, at_a_time: int, progress: Progress
) -> Report:
    """Runs and judges. `at_a_time`: how many runs are open. Everything it started has ended when it returns."""
    store = "postgresql" if postgres else "sqlite"
    report = Report(store, seed)
    begun = time.monotonic()
    async with Environment.open(home, postgres, WORKERS) as env:
        people, disturbances, stop = People(env, seed), Disturbances(env, seed), asyncio.Event()
        numbers = iter(range(runs))
        ended = 0

        async def attend() -> None:
            nonlocal ended
            for number in numbers:
                await people.attend(await people.start(number))
                ended += 1
                progress(store, ended, runs)

        watch = asyncio.create_task(people.watch())
        trouble = asyncio.create_task(disturbances.run(stop))
        work = asyncio.gather(*(attend() for _ in range(at_a_time)))
        try:
            while not work.done() and ended < runs - at_a_time:
                await asyncio.wait([work, trouble], timeout=1.0)
                if trouble.done():
                    trouble.result()
                if watch.done():
                    watch.result()
            stop.set()
            await trouble
            with suppress(TimeoutError):
                await asyncio.wait_for(work, CALM_S)
            await _swept(env, people.runs)
        finally:
            for task in (watch, trouble, work):
                task.cancel()
            await asyncio.wait([watch, trouble, work])
            if not work.cancelled():
                work.exception()  # read, so that it is not reported as lost: the first failure is on its way already
        report.disturbances, report.people, report.log = disturbances.done, people.done, disturbances.log
        for record in await _records(env, people.runs, disturbances.released):
            report.outcomes[record.result.outcome if record.result else record.status] += 1
            report.calls_repeated += len(record.calls) - len({call.key for call in record.calls})
            report.violations += judge(record)
        report.slowest_s = max((run.ended_at - run.began_at for run in people.runs if run.ended_at), default=0.0)
    report.seconds = time.monotonic() - begun
    return report


async def _swept(env: Environment, runs: Sequence[Run]) -> None:
    """Sweeps until every run that has effects, and was terminated, has its end on record."""
    rows, ledger = Runs(env.db), Ledger(env.db, "chaos")

    async def lacks_end(run: Run) -> bool:
        row = await rows.by_workflow(run.handle.id)
        return not (row and row.result) and has_effects(await ledger.entries(run.key_base))

    deadline = time.monotonic() + CALM_S
    while time.monotonic() < deadline:
        left = [run for run in runs if run.ended_at and await lacks_end(run)]
        if not left:
            return
        with suppress(RPCError):
            await env.client.get_schedule_handle(SCHEDULE_ID).trigger()
        await asyncio.sleep(5)


async def _records(env: Environment, runs: Sequence[Run], released: Sequence[float]) -> list[Record]:
    """Everything that is on record, read once from every side."""
    ledger, letters, rows = Ledger(env.db, "chaos"), await DeadLetters(env.db).find(), Runs(env.db)
    effects, calls = env.hospital_record.effects(), env.model_record.calls()
    broken = {each.workflow_id: str(each) for each in await replay_all(env.client, [run.handle.id for run in runs])}
    found = []
    for run in runs:
        prefix = f"{run.key_base}/"
        row = await rows.by_workflow(run.handle.id)
        described = await run.handle.describe()
        found.append(
            Record(
                workflow_id=run.handle.id,
                status=WorkflowExecutionStatus(described.status).name if described.status else "",
                result=RunResult.model_validate_json(row.result) if row and row.result else None,
                ledger=await ledger.entries(run.key_base),
                letters=[each for each in letters if each.workflow_id == run.handle.id],
                effects=[each for each in effects if each.key.startswith(prefix)],
                calls=[each for each in calls if each.key.startswith(prefix)],
                replay_error=broken.get(run.handle.id, ""),
                released=released,
            )
        )
    return found
