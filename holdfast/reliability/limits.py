"""Rate limits that all workers share: calls and tokens per sliding minute, booked ahead in one row of the store.

`limit_schedule` defines what a row holds and when a call may go out. A call that has to wait gets the time of its next
try from `NotYet`. No call waits inside a worker, and each waiting call comes back at its own time, so they do not all
come back at once.

Far below the limit, a call costs next to nothing. Most calls use a spare place, which takes no SQL statement, and the
next statement that is due anyway writes what they used.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256

from holdfast.authoring.services import Limit
from holdfast.reliability.in_flight import PREFIX, rooms
from holdfast.reliability.limit_schedule import (
    AIM_S,
    LATE_S,
    SLOT_S,
    LimitSchedule,
    Placed,
    Spares,
    advance,
    book_spares,
    change,
    place,
    settle,
)
from holdfast.reliability.waiting import NotYet
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database

_log = logging.getLogger(__name__)

FLUSH_S = 2.0
"""Seconds after which the process writes settled usage and spare places, if no other statement on the limit did it.

Spare places have expired by then, and most calls have asked for new ones, so a separate flush is the exception.
"""
HASTE_S = 0.2
"""`FLUSH_S` while calls wait: they need the capacity that settled calls free."""


# ------------------------------------------------------------------ the row in the store


@dataclass(frozen=True)
class Ticket:
    """Permission for one or more calls to go out now. `tokens`: the estimate as it is counted."""

    limit: Limit
    slot: int
    tokens: int
    requests: int = 1


@dataclass
class _Ask:
    limit: Limit
    key: str
    tokens: int
    not_before: int
    answer: asyncio.Future[tuple[Placed, float]]
    """The result, and the time of the decision."""


@dataclass
class _Row:
    """A limit's row as this process last saw it, and what it still has to write to it."""

    version: int | None = None
    book: LimitSchedule = field(default_factory=LimitSchedule)
    spares: Spares = field(default_factory=Spares)
    shared: bool = False
    """Other processes write to the row too, so reading it first is cheaper than a write that fails."""
    asks: list[_Ask] = field(default_factory=list)
    settled: list[tuple[Ticket, int | None]] = field(default_factory=list)
    """Each ticket with the tokens used; None: the call did not go out."""
    due: bool = False
    """The flush timer has fired: settled usage or spare places have to be written now."""
    timer: asyncio.TimerHandle | None = None
    task: asyncio.Task[None] | None = None

    def give_back(self) -> None:
        """Records the spare places as not used."""
        spares = self.spares
        if spares.limit and spares.left:
            self.settled.append((Ticket(spares.limit, spares.slot, spares.tokens, spares.requests), None))
            spares.requests = spares.tokens = 0


class Limiter:
    """The rate limits for all calls of a process.

    A call gets a spare place, or one statement serves all calls that ask at the same time.
    """

    def __init__(self, db: Database, clock: StoreClock) -> None:
        self._db = db
        self._clock = clock
        self._rows: dict[str, _Row] = {}

    async def take(self, limit: Limit, key: str, tokens: int = 0) -> Ticket:
        """Takes a ticket for a call that goes out at once: it should reach the service within half a second.

        key: the call's idempotency key; while the call waits, its place is kept under this key.
        tokens: an estimate, high rather than low.
        Raises NotYet when the call has to wait, and the store's errors.
        """
        return (await self.take_all([limit], key, tokens))[0]

    async def take_all(self, limits: Sequence[Limit], key: str, tokens: int = 0) -> tuple[Ticket, ...]:
        """Like `take`, for several limits: books one time at which all of them have capacity.

        A call that took one limit after the other would lose its place at one limit while it waits for another.
        """
        placed: list[Placed] = []
        now, start, binding = 0.0, 0, 0
        try:
            for limit in limits:
                answer, now = await self._ask(limit, key, tokens, 0)
                placed.append(answer)
            while booked := [i for i, each in enumerate(placed) if not each.granted]:
                last = max(booked, key=lambda i: placed[i].slot)
                if placed[last].slot > start:
                    start, binding = placed[last].slot, last
                behind = [i for i, each in enumerate(placed) if each.slot < start]
                if not behind and len(booked) == len(limits):
                    raise _not_yet(limits[binding], placed, now)
                # If none is behind, the slot began between two requests: ask again at the limits asked too early.
                for i in behind or booked:
                    if placed[i].granted:
                        self.release(Ticket(limits[i], placed[i].slot, placed[i].tokens))
                        placed[i] = replace(placed[i], granted=False)
                    placed[i], now = await self._ask(limits[i], key, tokens, start)
        except BaseException:
            for limit, each in zip(limits, placed, strict=False):
                if each.granted:
                    self.release(Ticket(limit, each.slot, each.tokens))
            raise
        return tuple(Ticket(limit, each.slot, each.tokens) for limit, each in zip(limits, placed, strict=True))

    def settle(self, ticket: Ticket, tokens: int) -> None:
        """Reports what the call really used. Call it once per ticket; the next statement on the limit writes it."""
        if ticket.limit.tokens is not None:
            self._note(ticket, tokens)

    def release(self, ticket: Ticket) -> None:
        """Returns a ticket instead of settling it: the call certainly did not go out."""
        self._note(ticket, None)

    async def close(self) -> None:
        """Writes settled usage and spare places. If the store fails, the estimates count for up to a minute more."""
        for name, row in self._rows.items():
            row.give_back()
            while row.settled or row.task:  # a running statement may leave more to release
                self._flush(name, row)
                if row.task:
                    await row.task
                row.give_back()

    def _note(self, ticket: Ticket, tokens: int | None) -> None:
        name = ticket.limit.name
        row = self._rows.setdefault(name, _Row())
        row.settled.append((ticket, tokens))
        self._flush_in(HASTE_S if row.book.waiting else FLUSH_S, name, row)

    def _flush_in(self, seconds: float, name: str, row: _Row) -> None:
        loop = asyncio.get_running_loop()
        if row.timer is not None and row.timer.when() <= loop.time() + seconds:
            return
        if row.timer is not None:
            row.timer.cancel()
        row.timer = loop.call_later(seconds, self._flush, name, row)

    def _flush(self, name: str, row: _Row) -> None:
        row.timer = None
        row.due = bool(row.settled) or row.spares.left
        if row.due:
            self._wake(name, row)

    async def _ask(self, limit: Limit, key: str, tokens: int, not_before: int) -> tuple[Placed, float]:
        row = self._rows.setdefault(limit.name, _Row())
        if not not_before and row.spares.requests:
            since = time.monotonic()
            now = await self._clock.now() + time.monotonic() - since
            if spare := row.spares.spend(limit, tokens, now):
                return spare, now
        short = sha256(key.encode()).hexdigest()[:12]
        ask = _Ask(limit, short, tokens, not_before, asyncio.get_running_loop().create_future())
        row.asks.append(ask)
        self._wake(limit.name, row)
        try:
            return await ask.answer
        except asyncio.CancelledError:
            # The ticket was granted, but the caller was cancelled before it received it.
            if not ask.answer.cancelled() and not ask.answer.exception() and (placed := ask.answer.result()[0]).granted:
                self.release(Ticket(limit, placed.slot, placed.tokens))
            raise

    def _wake(self, name: str, row: _Row) -> None:
        if row.task is None:
            row.task = asyncio.get_running_loop().create_task(self._serve(name, row))

    async def _serve(self, name: str, row: _Row) -> None:
        try:
            while row.asks or row.due:
                await self._work_off(name, row)
        finally:
            row.task = None

    async def _work_off(self, name: str, row: _Row) -> None:
        """Answers all waiting requests with one write. Requests that arrive while the write is retried join it."""
        asks: list[_Ask] = []
        settled: list[tuple[Ticket, int | None]] = []
        try:
            while True:
                asks = [ask for ask in asks + row.asks if not ask.answer.done()]
                settled += row.settled
                row.asks, row.settled, row.due = [], [], False
                if row.timer is not None:
                    row.timer.cancel()
                    row.timer = None
                if row.version is None or row.shared:
                    await self._read(name, row)
                since = time.monotonic()
                now = await self._clock.now()
                if asks or row.spares.expired(now):
                    row.give_back()
                    settled += row.settled
                    row.settled = []
                placed = _decide(row.book, now, asks, settled)
                spares = _spares(row, now, asks)
                if await self._write(name, row):
                    break
                row.version, row.shared = None, True
                # One of the competing processes always succeeds; the pause keeps it from being the same one each time.
                await asyncio.sleep(random.uniform(0, 0.005))
        except BaseException as error:
            # Not written again: the usage may have been stored already and would count twice. The estimates stay.
            row.version = None
            for ask in asks:
                if not ask.answer.done():
                    ask.answer.set_exception(error) if isinstance(error, Exception) else ask.answer.cancel()
            if not isinstance(error, Exception):
                raise
            if settled:
                message = "rate limit %s: real usage of %d calls was not written, so their estimates count: %s"
                _log.warning(message, name, len(settled), error)
            return
        now += time.monotonic() - since
        row.spares = spares
        for ask, each in zip(asks, placed, strict=True):
            # The store was slow or this process was frozen: the call is too late for its slot and has to ask again.
            late = each.granted and now > each.slot * SLOT_S + LATE_S
            if each.granted and (late or ask.answer.done()):
                self.release(Ticket(ask.limit, each.slot, each.tokens))
            if ask.answer.done():
                continue
            if late:
                row.asks.append(ask)
            else:
                ask.answer.set_result((each, now))
        row.asks = [ask for ask in row.asks if not _grant_spare(row.spares, ask, now)]
        if row.spares.left:
            self._flush_in(FLUSH_S, name, row)

    async def _read(self, name: str, row: _Row) -> None:
        while (found := await self._db.one("SELECT version, book FROM limits WHERE name = ?", name)) is None:
            await self._db.run(
                "INSERT INTO limits (name, version, book) VALUES (?, 0, ?) ON CONFLICT DO NOTHING",
                name,
                LimitSchedule().dump(),
            )
        if found[0] == row.version:
            row.shared = False
        else:
            row.version, row.book = found[0], LimitSchedule.load(found[1])

    async def _write(self, name: str, row: _Row) -> bool:
        """Returns False when another process has changed the row; it has to be read again."""
        assert row.version is not None, "read before"
        sql = "UPDATE limits SET book = ?, version = version + 1 WHERE name = ? AND version = ?"
        if not await self._db.run(sql, row.book.dump(), name, row.version):
            return False
        row.version += 1
        return True


def _decide(
    book: LimitSchedule, now: float, asks: list[_Ask], settled: list[tuple[Ticket, int | None]]
) -> list[Placed]:
    advance(book, now)
    for ticket, used in settled:
        if used is None:
            change(book, ticket.slot, -ticket.requests, -ticket.tokens)
        else:
            settle(book, ticket.slot, ticket.tokens, used)
    return [place(book, ask.limit, ask.key, ask.tokens, ask.not_before) for ask in asks]


def _spares(row: _Row, now: float, asks: list[_Ask]) -> Spares:
    """Books spare places, as many as recent use suggests. Books none when no call asks."""
    if not asks:
        return row.spares
    limit, tokens = asks[-1].limit, max(ask.tokens for ask in asks)
    return book_spares(row.book, limit, row.spares.wanted(now, len(asks)), tokens)


def _grant_spare(spares: Spares, ask: _Ask, now: float) -> bool:
    """Grants a spare place, if there is one, to a call that arrived while the statement ran."""
    if ask.not_before or ask.answer.done() or not (spare := spares.spend(ask.limit, ask.tokens, now)):
        return False
    ask.answer.set_result((spare, now))
    return True


def _not_yet(limit: Limit, placed: list[Placed], now: float) -> NotYet:
    # With several limits, coming back early for one of them would give up the places at the others.
    at = placed[0].look_at if len(placed) == 1 else placed[0].slot * SLOT_S + AIM_S
    parts = [f"{limit.requests} requests"] * bool(limit.requests) + [f"{limit.tokens} tokens"] * bool(limit.tokens)
    due = datetime.fromtimestamp(placed[0].slot * SLOT_S, UTC)
    return NotYet(at - now, f"rate limit of {limit.name}: {' and '.join(parts)} a minute; next at {due:%H:%M:%S} UTC")


# ------------------------------------------------------------------ for display


@dataclass(frozen=True)
class LimitUsage:
    """How much of a limit is used, according to its row.

    `requests` and `tokens`: of the last minute, with spare places and the estimates of unfinished calls.
    """

    name: str
    requests: int
    tokens: int
    waiting: int
    last_due: float | None
    """When the last of the waiting calls is due, epoch seconds."""
    in_flight: int = 0
    """Calls that hold a place, for a service with a limit on calls in flight."""


async def usage(db: Database, now: float) -> list[LimitUsage]:
    """Returns every limit that was ever used, sorted by name. now: the store's time."""
    rows = await db.all("SELECT name, book FROM limits ORDER BY name")
    found = {name: _usage(name, LimitSchedule.load(text), now) for name, text in rows if not name.startswith(PREFIX)}
    for name, (held, waiting) in (await rooms(db, now)).items():
        known = found.get(name, LimitUsage(name, 0, 0, 0, None))
        found[name] = replace(known, in_flight=held, waiting=known.waiting + waiting)
    return [found[name] for name in sorted(found)]


def _usage(name: str, book: LimitSchedule, now: float) -> LimitUsage:
    advance(book, now)
    due = [slot for slot, _ in book.waiting.values()]
    for slot, tokens in book.waiting.values():
        change(book, slot, -1, -tokens)
    last = [both for slot, both in book.slots.items() if now - 60 < slot * SLOT_S <= now]
    requests, tokens = sum(calls for calls, _ in last), sum(used for _, used in last)
    return LimitUsage(name, requests, tokens, len(due), max(due) * SLOT_S if due else None)
