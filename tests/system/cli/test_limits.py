"""`limits` shows what the last minute has used of each rate limit, and who waits."""

import json
import os

import pytest

from holdfast.authoring.services import InFlight, Limit
from holdfast.dev.stack import without_ours
from holdfast.reliability.in_flight import CallsInFlight
from holdfast.reliability.limits import Limiter
from holdfast.reliability.waiting import NotYet
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database
from tests.fixtures.stack import Cli


async def test_used_and_waiting_calls_are_listed(db: Database, store_url: str) -> None:
    cli = Cli({**without_ours(os.environ), "DATABASE_URL": store_url})
    assert "no call has been under a limit yet" in cli("limits").stdout
    limiter, limit = Limiter(db, StoreClock(db)), Limit("tool notify", requests=2)
    for key in ("k1", "k2"):
        await limiter.take(limit, key)
    with pytest.raises(NotYet):
        await limiter.take(limit, "k3")
    await limiter.close()
    (row,) = json.loads(cli("limits", "--json").stdout)
    assert (row["name"], row["requests"], row["waiting"]) == ("tool notify", 2, 1)
    assert "tool notify" in cli("limits").stdout


async def test_calls_in_flight_are_listed(db: Database, store_url: str) -> None:
    cli = Cli({**without_ours(os.environ), "DATABASE_URL": store_url})
    places = CallsInFlight(db, StoreClock(db))
    async with places.held(InFlight("model small", 2), "k1"):
        (row,) = json.loads(cli("limits", "--json").stdout)
        assert (row["name"], row["in_flight"], row["waiting"]) == ("model small", 1, 0)
    (row,) = json.loads(cli("limits", "--json").stdout)
    assert row["in_flight"] == 0
    await places.close()
