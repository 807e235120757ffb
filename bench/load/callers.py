"""A worker process of `bench.load.breaker`: calls one service without a rest, guarded by the shared breaker.

It does what the protection chain does around a read, without the ledger: a look at the row before each call, `admit`
when it is not closed, `check` before acting late. It asks again after 50 ms whatever it was told, so that what keeps
the calls back is the breaker and not the callers' patience. A call that did not succeed is tried again under its key.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import asdict, dataclass

import httpx2

from holdfast.authoring.services import BreakerRule
from holdfast.reliability.breaker import Breaker, Pass
from holdfast.reliability.errors import classify
from holdfast.reliability.ledger import Fenced
from holdfast.reliability.waiting import NotYet
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database
from holdfast.state.opening import open_database

TARGET = "records"
PAUSE_S = 0.05
STALE_S = 1.0


@dataclass(frozen=True)
class Orders:
    """What a process is told to do, as JSON in its only argument. `first_key`: the key of its first call."""

    store: str
    service: str
    probe_after_s: float
    timeout_s: float
    lease_s: float
    first_key: str = ""

    def argument(self) -> str:
        return json.dumps(asdict(self))


async def work(orders: Orders) -> None:
    """Calls for ever; the process is killed at the end."""
    db = await open_database(orders.store)
    breaker = Breaker(db, clock := StoreClock(db))
    number, key = 0, orders.first_key or f"{os.getpid()}/0"
    async with httpx2.AsyncClient(base_url=orders.service, timeout=None) as http:
        while True:
            try:
                answered = await _call(orders, db, clock, breaker, http, key)
            except (NotYet, Fenced):
                answered = False
            if answered:
                number += 1
                key = f"{os.getpid()}/{number}"
            await asyncio.sleep(PAUSE_S)


async def _call(
    orders: Orders, db: Database, clock: StoreClock, breaker: Breaker, http: httpx2.AsyncClient, key: str
) -> bool:
    rule = BreakerRule(probe_after_s=orders.probe_after_s)
    row = await db.one("SELECT state, paused_until, failures FROM breakers WHERE target = ?", TARGET)
    passed = Pass(TARGET, rule, failures=row[2] if row else 0)
    if row is not None and (row[0] != "closed" or row[1] > await clock.now()):
        passed = await breaker.admit(TARGET, rule, key, orders.lease_s)
    if time.monotonic() - passed.since > STALE_S:
        await breaker.check(passed)
    try:
        async with asyncio.timeout(orders.timeout_s):
            answer = await http.get("/records/patients/pat-1", headers={"Idempotency-Key": key})
            answer.raise_for_status()
    except (TimeoutError, httpx2.HTTPError) as error:
        await breaker.failed(passed, classify(error))
        return False
    await breaker.succeeded(passed)
    return True


if __name__ == "__main__":
    asyncio.run(work(Orders(**json.loads(sys.argv[1]))))
