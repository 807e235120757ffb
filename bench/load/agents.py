"""One process of agents: `python -m bench.load.agents`, told what to do by JSON on its input; prints JSON.

Each agent takes its leave of the limiter, calls the service, settles, and begins again. It sleeps only when it is told
to wait, and only as long as it is told.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass

import httpx2

from holdfast.authoring.services import Limit
from holdfast.reliability.limits import Limiter, Ticket
from holdfast.reliability.waiting import NotYet
from holdfast.state.clock import StoreClock
from holdfast.state.opening import open_database


@dataclass
class Orders:
    store: str
    service: str
    process: int
    agents: int
    seconds: float
    requests: int
    tokens: int
    estimate: tuple[int, int]
    used: tuple[float, float]
    """Real tokens as a share of the estimate, from and to."""


@dataclass
class Told:
    """What came of it, over all agents of the process."""

    waits: list[float]
    """Seconds between the wish to call and the leave."""
    asked: int = 0
    in_limiter_s: float = 0.0


async def work(orders: Orders) -> Told:
    db = await open_database(orders.store)
    limiter = Limiter(db, StoreClock(db))
    limit = Limit("model", orders.requests, orders.tokens)
    told, end = Told([]), time.monotonic() + orders.seconds

    async def ask(key: str, tokens: int) -> Ticket | NotYet:
        begun = time.monotonic()
        try:
            return await limiter.take(limit, key, tokens)
        except NotYet as wait:
            return wait
        finally:
            told.asked += 1
            told.in_limiter_s += time.monotonic() - begun

    async def agent(name: str) -> None:
        rng, turn = random.Random(name), 0
        while time.monotonic() < end:
            turn += 1
            estimate, since = rng.randint(*orders.estimate), time.monotonic()
            while isinstance(answer := await ask(f"{name}/{turn}", estimate), NotYet):
                if time.monotonic() + answer.delay > end:
                    return
                await asyncio.sleep(answer.delay)
            told.waits.append(time.monotonic() - since)
            tokens = round(estimate * rng.uniform(*orders.used))
            await client.post(orders.service, json={"agent": name, "tokens": tokens})
            limiter.settle(answer, tokens)

    async with httpx2.AsyncClient(timeout=30) as client:
        await asyncio.gather(*(agent(f"{orders.process}.{n}") for n in range(orders.agents)))
    await limiter.close()
    await db.close()
    return told


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(work(Orders(**json.load(sys.stdin)))))))
