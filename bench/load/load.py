"""Many agents in many processes on one limit of one store, against a service that counts: what came of it."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from dataclasses import asdict, dataclass

from bench.load.agents import Orders, Told
from bench.load.service import Service
from holdfast.authoring.services import Limit
from holdfast.reliability.limit_schedule import SLOT_S, SPAN


@dataclass(frozen=True)
class Load:
    """Which of the two limits binds follows from the size of the calls."""

    name: str
    estimate: tuple[int, int]
    used: tuple[float, float]
    requests: int = 600
    tokens: int = 60_000
    processes: int = 8
    agents: int = 25
    seconds: float = 150.0


LOADS = (
    Load("requests bind", estimate=(20, 140), used=(0.5, 1.0)),
    Load("tokens bind", estimate=(100, 300), used=(1.0, 1.0)),
)


@dataclass(frozen=True)
class Report:
    load: Load
    most: tuple[int, int]
    """Requests and tokens of the fullest sliding minute."""
    calls: int
    used: float
    """Of the allowed rate, while it is saturated; nan when the run was too short to tell."""
    refused: int
    least_agent: int
    most_agent: int
    longest_wait_s: float
    asked_per_call: float
    answer_ms: float
    """What a question to the limiter took."""

    def failures(self) -> list[str]:
        """The claims that do not hold."""
        load = self.load
        claims = {
            f"a minute with {self.most[0]} requests, {load.requests} are allowed": self.most[0] > load.requests,
            f"a minute with {self.most[1]} tokens, {load.tokens} are allowed": self.most[1] > load.tokens,
            f"{self.refused} calls answered 429": self.refused > 0,
            f"only {self.used:.1%} of the allowed rate used": self.used < 0.95,
            "an agent that made no call": self.least_agent == 0,
        }
        return [words for words, wrong in claims.items() if wrong]


async def run(load: Load, store: str) -> Report:
    """The load on a migrated store, with a process per `load.processes`."""
    service = Service(Limit("model", load.requests, load.tokens))
    async with service.serve() as url:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_process(load, store, url, number)) for number in range(load.processes)]
        told = [task.result() for task in tasks]
    calls = [service.calls[f"{process}.{n}"] for process in range(load.processes) for n in range(load.agents)]
    waits = [wait for each in told for wait in each.waits]
    asked = sum(each.asked for each in told)
    return Report(
        load,
        service.most_in_a_minute(),
        len(waits),
        _share_used(service, load),
        service.refused,
        min(calls),
        max(calls),
        max(waits, default=0.0),
        asked / max(len(waits), 1),
        1000 * sum(each.in_limiter_s for each in told) / max(asked, 1),
    )


async def _process(load: Load, store: str, url: str, number: int) -> Told:
    orders = Orders(store, url, number, load.agents, load.seconds, load.requests, load.tokens, load.estimate, load.used)
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "bench.load.agents", stdin=PIPE, stdout=PIPE)
    try:
        output, _ = await process.communicate(json.dumps(asdict(orders)).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"process {number} of the agents ended with status {process.returncode}")
    return Told(**json.loads(output))


def _share_used(service: Service, load: Load) -> float:
    """Over whole spans of the limiter, from the second one on: the first one's burst comes from an idle limit."""
    period = SPAN * SLOT_S
    begin = service.arrivals[0][0] + period
    whole = int((load.seconds - period) // period)
    if whole < 1:
        return float("nan")
    inside = [tokens for at, tokens in service.arrivals if begin - 1 <= at < begin - 1 + whole * period]
    minutes = whole * period / 60
    return max(len(inside) / minutes / load.requests, sum(inside) / minutes / load.tokens)
