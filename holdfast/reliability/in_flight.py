"""Limits how many calls of a service are in flight at once, across all workers. Each call holds a place under a lease.

One row per service holds the places. A process renews the leases of its places; the places of a killed or frozen
process are free when their leases end. A call that finds no place waits up to `QUEUE_S` in its worker, then raises
NotYet.

Meant for services that can take only few calls at once (a local model with one slot): each call costs four statements.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from holdfast.authoring.services import InFlight
from holdfast.reliability.waiting import NotYet
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database, StoreUnavailable

_log = logging.getLogger(__name__)

PREFIX = "in flight: "
"""Prefix of the names of these rows in the table `limits`."""
LEASE_S, RENEW_S = 15.0, 5.0
QUEUE_S, LOOK_S = 5.0, 0.25
"""Seconds that a call waits in its worker, and between its looks at the row."""
SHORTEST_NAP_S, LONGEST_NAP_S = 1.0, 60.0
KEPT = 0.8
"""Weight of the old average of call durations when a call ends."""


@dataclass
class Room:
    """The content of a row. `held`: token and end of the lease of each place, by the call's key."""

    held: dict[str, tuple[str, float]] = field(default_factory=dict)
    waiting: dict[str, float] = field(default_factory=dict)
    """The time at which each waiting call is expected back."""
    took: float = 1.0
    """Average seconds of recent calls."""

    @classmethod
    def load(cls, text: str) -> Room:
        data = json.loads(text)
        return cls({key: (token, until) for key, (token, until) in data["held"].items()}, data["waiting"], data["took"])

    def dump(self) -> str:
        return json.dumps({"held": self.held, "waiting": self.waiting, "took": round(self.took, 2)})

    def advance(self, now: float) -> None:
        """Removes places whose lease is over, and waiting calls that did not come back."""
        self.held = {key: both for key, both in self.held.items() if both[1] > now}
        self.waiting = {key: due for key, due in self.waiting.items() if due + 2 * QUEUE_S > now}

    def take(self, key: str, token: str, most: int, now: float) -> bool:
        """Takes a place; False if none is free. A call that comes back after its worker died has its place at once."""
        self.advance(now)
        if len(self.held) >= most and key not in self.held:
            return False
        self.held[key] = (token, now + LEASE_S)
        self.waiting.pop(key, None)
        return True

    def nap(self, key: str, most: int, now: float, chance: float) -> float:
        """Returns how long the call should wait: about as long as the waiting calls need. chance: random, in [0, 1)."""
        longest = (len({*self.waiting, key})) * self.took / most
        nap = min(max(longest * (0.25 + 0.75 * chance), SHORTEST_NAP_S), LONGEST_NAP_S)
        self.waiting[key] = now + nap
        return nap

    def renew(self, tokens: set[str], now: float) -> None:
        self.held = {k: (t, now + LEASE_S if t in tokens else until) for k, (t, until) in self.held.items()}

    def leave(self, key: str, token: str, took: float) -> None:
        """Gives the place back, unless another attempt has taken it over."""
        if self.held.get(key, ("",))[0] == token:
            del self.held[key]
        self.took = KEPT * self.took + (1 - KEPT) * took


class CallsInFlight:
    """The places of one process, for all services that limit their calls in flight."""

    def __init__(self, db: Database, clock: StoreClock) -> None:
        self._db = db
        self._clock = clock
        self._mine: dict[str, set[str]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._freed: dict[str, asyncio.Event] = {}
        self._renewing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def held(self, limit: InFlight, key: str) -> AsyncIterator[None]:
        """Holds a place during the block. Raises NotYet when none is free."""
        token = secrets.token_hex(4)
        await self._take(limit, key, token)
        began = time.monotonic()
        mine = self._mine.setdefault(limit.name, set())
        mine.add(token)
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())
        try:
            yield
        finally:
            mine.discard(token)
            # Shielded: a cancelled call gives its place back too. If the store fails, the lease ends by itself.
            await asyncio.shield(self._leave(limit, key, token, time.monotonic() - began))

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()

    async def _take(self, limit: InFlight, key: str, token: str) -> None:
        until = time.monotonic() + QUEUE_S
        while True:
            freed = self._freed.setdefault(limit.name, asyncio.Event())
            freed.clear()
            last = time.monotonic() >= until
            if (nap := await self._ask(limit, key, token, last=last)) is None:
                return
            if last:
                words = f"{limit.name} has {limit.most} calls in flight, which is its limit"
                raise NotYet(nap, words)
            try:
                async with asyncio.timeout(LOOK_S * (0.5 + random.random())):
                    await freed.wait()
            except TimeoutError:
                continue

    async def _ask(self, limit: InFlight, key: str, token: str, *, last: bool) -> float | None:
        """Asks for a place. Returns None if the call has it, else how long to wait before it comes back.

        last: the caller will not ask again in this attempt. Only then is the wait computed and recorded.
        """
        nap = 0.0
        async with self._lock(limit.name):
            while True:
                version, room = await self._read(limit.name)
                now = await self._clock.now()
                taken = room.take(key, token, limit.most, now)
                if not taken and not last:
                    return 0.0
                if not taken:
                    nap = room.nap(key, limit.most, now, random.random())
                if await self._write(limit.name, version, room):
                    return None if taken else nap

    async def _leave(self, limit: InFlight, key: str, token: str, took: float) -> None:
        try:
            async with self._lock(limit.name):
                while True:
                    version, room = await self._read(limit.name)
                    room.leave(key, token, took)
                    if await self._write(limit.name, version, room):
                        break
        except StoreUnavailable as error:
            message = "%s: a place was not given back and stays taken until its lease ends, in up to %g s: %s"
            _log.warning(message, limit.name, LEASE_S, error)
        if event := self._freed.get(limit.name):
            event.set()

    async def _renew(self) -> None:
        while any(self._mine.values()):
            await asyncio.sleep(RENEW_S)
            for name, tokens in list(self._mine.items()):
                if not tokens:
                    continue
                try:
                    async with self._lock(name):
                        while True:
                            version, room = await self._read(name)
                            room.renew(tokens, await self._clock.now())
                            if await self._write(name, version, room):
                                break
                except StoreUnavailable as error:
                    _log.warning("%s: the leases of places were not renewed: %s", name, error)

    def _lock(self, name: str) -> asyncio.Lock:
        """Returns the lock that lets one task per process change the row, as they would only conflict there."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def _read(self, name: str) -> tuple[int, Room]:
        while (found := await self._db.one("SELECT version, book FROM limits WHERE name = ?", PREFIX + name)) is None:
            sql = "INSERT INTO limits (name, version, book) VALUES (?, 0, ?) ON CONFLICT DO NOTHING"
            await self._db.run(sql, PREFIX + name, Room().dump())
        return found[0], Room.load(found[1])

    async def _write(self, name: str, version: int, room: Room) -> bool:
        """Returns False when another process has changed the row."""
        sql = "UPDATE limits SET book = ?, version = version + 1 WHERE name = ? AND version = ?"
        return await self._db.run(sql, room.dump(), PREFIX + name, version) == 1


async def rooms(db: Database, now: float) -> dict[str, tuple[int, int]]:
    """Returns the numbers of calls in flight and of waiting calls, by service. now: the store's time."""
    rows = await db.all("SELECT name, book FROM limits WHERE name LIKE ? ORDER BY name", f"{PREFIX}%")
    found = {}
    for name, text in rows:
        room = Room.load(text)
        room.advance(now)
        found[name.removeprefix(PREFIX)] = (len(room.held), len(room.waiting))
    return found
