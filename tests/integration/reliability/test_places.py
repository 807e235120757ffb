"""Calls in flight: never more than allowed, over several processes, and nothing is held for ever."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.authoring.services import InFlight, Service
from holdfast.reliability import in_flight as module
from holdfast.reliability.in_flight import LEASE_S, CallsInFlight, Room, rooms
from holdfast.reliability.waiting import NotYet
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database
from tests.fixtures.clock import Ahead

TWO = InFlight("model small", 2)


async def test_over_two_processes_no_more_than_allowed_are_in_flight_and_all_get_a_turn(db: Database) -> None:
    both = [CallsInFlight(db, StoreClock(db)) for _ in range(2)]
    inside, most = 0, 0

    async def call(n: int) -> None:
        nonlocal inside, most
        while True:
            try:
                async with both[n % 2].held(TWO, f"run-{n}/1"):
                    inside += 1
                    most = max(most, inside)
                    await asyncio.sleep(0.01)
                    inside -= 1
                return
            except NotYet:  # the workflow's timer
                continue

    await asyncio.gather(*(call(n) for n in range(24)))
    assert most == 2
    assert await rooms(db, await StoreClock(db).now()) == {TWO.name: (0, 0)}
    for each in both:
        await each.close()


async def test_a_place_of_a_process_that_died_is_free_when_its_lease_is_over(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUEUE_S", 0.0)
    one = InFlight("model small", 1)
    clock = Ahead(db)
    dead, other = CallsInFlight(db, clock), CallsInFlight(db, clock)
    await dead._take(one, "a/1", "its token")  # pyright: ignore[reportPrivateUsage] - and no more is heard of it
    with pytest.raises(NotYet):
        async with other.held(one, "b/1"):
            pass
    async with other.held(one, "a/1"):
        """The same call, tried again on another worker, need not wait for its own place."""
    await dead._take(one, "a/1", "its token")  # pyright: ignore[reportPrivateUsage]
    clock.seconds += LEASE_S + 1
    async with other.held(one, "b/1"):
        assert await rooms(db, await clock.now()) == {one.name: (1, 0)}


async def test_what_is_held_for_long_is_renewed(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_S", 0.01)
    clock = Ahead(db)
    places = CallsInFlight(db, clock)
    async with places.held(TWO, "a/1"):
        for _ in range(3):
            clock.seconds += LEASE_S * 0.9
            until = await clock.now() + LEASE_S * 0.9
            while True:
                _, room = await places._read(TWO.name)  # pyright: ignore[reportPrivateUsage]
                if room.held["a/1"][1] > until:
                    break
                await asyncio.sleep(0.01)
    await places.close()


async def test_a_cancelled_call_gives_its_place_back(db: Database) -> None:
    places = CallsInFlight(db, StoreClock(db))
    held = asyncio.Event()

    async def call() -> None:
        async with places.held(TWO, "a/1"):
            held.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await held.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while await rooms(db, await StoreClock(db).now()) != {TWO.name: (0, 0)}:
        await asyncio.sleep(0.01)
    await places.close()


def test_an_attempt_that_was_overtaken_gives_nothing_back() -> None:
    room = Room()
    assert room.take("a/1", "first", 1, 0.0)
    assert room.take("a/1", "second", 1, 1.0)
    room.leave("a/1", "first", 1.0)
    assert not room.take("b/1", "other", 1, 2.0)
    room.leave("a/1", "second", 1.0)
    assert room.take("b/1", "other", 1, 2.0)


def test_the_more_wait_and_the_longer_calls_take_the_longer_they_stay_away() -> None:
    room = Room(took=20.0)
    assert 5 <= room.nap("a", 1, 0.0, 0.0) <= room.nap("a", 1, 0.0, 0.99) <= 20
    assert room.nap("b", 2, 0.0, 0.99) <= 20
    for n in range(50):
        assert 1 <= room.nap(f"c{n}", 1, 0.0, 0.5) <= 60
    assert len(room.waiting) == 52
    room.advance(1000.0)
    assert not room.waiting


def test_a_service_declares_how_many_calls_it_bears() -> None:
    assert Service("ocr", max_in_flight=3).in_flight("t1") == InFlight("ocr@t1", 3)
    assert Service("ocr").in_flight("default") is None
    with pytest.raises(TypeError, match="at least one"):
        Service("ocr", max_in_flight=-1)
