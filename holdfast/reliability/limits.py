"""Rate limits that all workers share: calls and tokens per sliding minute, booked ahead in one row of the store.

The book of a limit counts calls and tokens per half-second slot, past and booked. A call gets the earliest slot in
which no minute exceeds a limit. If that slot is now, the call goes out. If not, the slot is booked under the call's key
and `NotYet` says when to come back: nobody waits in a worker, and those that wait come one by one, not as a herd.

Promises, as long as no call uses more tokens than were estimated:
- In no sliding minute do more calls or tokens go out than allowed. Saturated, at least 95 % of the rate is used, less
  the fragment into which the next call's tokens do not fit.
- Nobody starves: a booked slot never moves back, so a call waits only for those that were booked before it. Calls
  of equal size are served in their order, except where room comes free later: whoever asks next may have it.
- A call that comes back more than `LATE_S` after its slot has lost it and is booked anew.

An estimate counts until it is settled. When the process dies before, it counts until its minute is over.
A call whose estimate is above the whole token limit counts as the whole limit: it goes out alone, in an empty minute.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import count

from holdfast.reliability.waiting import NotYet
from holdfast.services import Limit
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database

_log = logging.getLogger(__name__)

SLOT_S = 0.5
LATE_S = 2.0
"""Seconds after the begin of its slot within which a call has to be let out."""
SPAN = 125
"""Slots that are held to the limit: those of 62.5 s.

A call counted in a slot is let out within LATE_S of the slot's begin and reaches the service at most 0.5 s later (the
workers' clocks may differ by a part of that). So two calls whose slots are SPAN or more apart arrive at least
62.5 - 2.5 = 60 s apart, never in one minute. The price: of a saturated limit 60 / 62.5 = 96 % is used.
"""
PEAK = 2
"""While calls wait, they go out at up to this multiple of the mean rate, so that a burst does not come back as one."""
AIM_S = 0.05
"""A waiting call is told to come so long after its slot began: a timer that rings early would cost another round."""
FLUSH_S = 0.2
"""Seconds after which what was settled is written, when no other statement on the limit takes it along."""
EARLY_S = 5.0
"""A look before its slot has to be so much earlier to be worth a call's while."""
MEMORY = 0.98
"""Of what was learned about estimates, the part that is kept at each settling."""


# ------------------------------------------------------------------ the book: pure


@dataclass
class Book:
    """What is known of one limit. `slots`: calls and tokens by slot (epoch seconds // SLOT_S), booked ones included."""

    at: float = 0.0
    """The latest time seen; it never goes back. A store whose clock is set back waits until it has caught up."""
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    waiting: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Booked slot and tokens of each waiting call, by digest of its key."""
    estimated: float = 0.0
    used: float = 0.0
    """Tokens of the calls settled of late: estimated and real."""

    @classmethod
    def load(cls, text: str) -> Book:
        data = json.loads(text)
        return cls(
            data["at"],
            {slot: (requests, tokens) for slot, requests, tokens in data["slots"]},
            {key: (slot, tokens) for key, (slot, tokens) in data["waiting"].items()},
            *data["learned"],
        )

    def dump(self) -> str:
        data = {
            "at": round(self.at, 3),
            "slots": [[slot, *counted] for slot, counted in self.slots.items()],
            "waiting": self.waiting,
            "learned": [round(self.estimated), round(self.used)],
        }
        return json.dumps(data, separators=(",", ":"))


@dataclass(frozen=True)
class Placed:
    """Where a call stands: let out now (`granted`), or booked."""

    slot: int
    tokens: int
    """As counted in the slot."""
    granted: bool
    look_at: float
    """When to come back, epoch seconds."""


def advance(book: Book, now: float) -> None:
    """Brings the book to the time: slots that no longer count go, and the bookings whose call did not come."""
    before, book.at = book.at, max(book.at, now)
    if book.at // SLOT_S > before // SLOT_S:
        oldest = int(book.at // SLOT_S) - SPAN
        book.slots = {slot: counted for slot, counted in book.slots.items() if slot > oldest}
    for key, (slot, tokens) in list(book.waiting.items()):
        if slot * SLOT_S + LATE_S < book.at:
            del book.waiting[key]
            change(book, slot, -1, -tokens)


def change(book: Book, slot: int, requests: int, tokens: int) -> None:
    """Counts more, or less, in a slot. One that has left the book is left alone."""
    if slot <= int(book.at // SLOT_S) - SPAN:
        return
    before = book.slots.get(slot, (0, 0))
    after = (max(before[0] + requests, 0), max(before[1] + tokens, 0))
    if after == (0, 0):
        book.slots.pop(slot, None)
    else:
        book.slots[slot] = after


def settle(book: Book, slot: int, estimated: int, used: int) -> None:
    """Counts what a call has really used, and learns how far estimates are off."""
    change(book, slot, 0, used - estimated)
    book.estimated = book.estimated * MEMORY + estimated
    book.used = book.used * MEMORY + used


def place(book: Book, limit: Limit, key: str, tokens: int, not_before: int = 0) -> Placed:
    """Lets the call of this key out now, if the book (advanced to now) has room, or books it.

    A key that was booked has its slot, or an earlier one that has come free.
    not_before: a slot before which it is not to go out.
    """
    tokens = 0 if limit.tokens is None else min(tokens, limit.tokens)
    this = int(book.at // SLOT_S)
    start = max(this, not_before)
    held = book.waiting.pop(key, None)
    if held is not None:
        change(book, held[0], -1, -held[1])
    if held and held[0] <= this == start and _earliest(book, limit, tokens, held[0], paced=False) == held[0]:
        slot = held[0]
    else:
        slot = _earliest(book, limit, tokens, start, paced=bool(book.waiting))
        if held and this < held[0] >= start:
            slot = min(slot, held[0])  # it never moves back, not even when others use more than they said
    change(book, slot, 1, tokens)
    granted = slot <= this
    if not granted:
        book.waiting[key] = (slot, tokens)
    return Placed(slot, tokens, granted, _look_at(book, slot))


def _earliest(book: Book, limit: Limit, tokens: int, start: int, *, paced: bool) -> int:
    """The first slot from `start` on in which a call of so many tokens breaks no limit, also of those booked after it.

    paced: and in which not too many go out at once.
    """
    slots, nothing = book.slots, (0, 0)
    most = float("inf") if limit.requests is None else limit.requests
    most_tokens = float("inf") if limit.tokens is None else limit.tokens
    if not paced:  # most limits are far from full: no need to look at each minute
        calls, busy = sum(counted[0] for counted in slots.values()), sum(counted[1] for counted in slots.values())
        if calls + 1 <= most and busy + tokens <= most_tokens:
            return start
    before = [slots.get(slot, nothing) for slot in range(start - SPAN, start)]
    requests = sum(counted[0] for counted in before)
    used = sum(counted[1] for counted in before)
    found = start
    for end in count(start):  # the span that ends with this slot
        entering, leaving = slots.get(end, nothing), slots.get(end - SPAN, nothing)
        requests += entering[0] - leaving[0]
        used += entering[1] - leaving[1]
        if requests + 1 > most or used + tokens > most_tokens:
            found = end + 1
        elif end >= found + SPAN - 1:  # every span that has `found` in it was looked at
            calls, busy = slots.get(found, nothing)
            crowded = (calls + 1) * SPAN > PEAK * most or (busy + tokens) * SPAN > PEAK * most_tokens
            if not (paced and calls and crowded):
                return found
            found += 1
    raise AssertionError("unreachable: the book ends, and after it there is room")


def _look_at(book: Book, slot: int) -> float:
    """When the call should come back.

    Where estimates turn out too high, room comes free before the slot: without a look before it, that room is lost. At
    half the way at the earliest, so that a call looks a few times, not often.
    """
    begin = slot * SLOT_S
    ratio = max(0.5, min(1.0, book.used / book.estimated)) if book.estimated else 1.0
    early = (begin - book.at) * (1 - ratio)
    return begin - early if early >= EARLY_S else begin + AIM_S


# ------------------------------------------------------------------ the row in the store


@dataclass(frozen=True)
class Ticket:
    """A call that was let out. `tokens`: the estimate as it is counted."""

    limit: Limit
    slot: int
    tokens: int


@dataclass
class _Ask:
    limit: Limit
    key: str
    tokens: int
    not_before: int
    answer: asyncio.Future[tuple[Placed, float]]
    """With the time of the decision."""


@dataclass
class _Row:
    """A limit's row as this process has last seen it, and what is to be written to it."""

    version: int | None = None
    book: Book = field(default_factory=Book)
    shared: bool = False
    """Other processes write to it as well: to read it first is cheaper than to try."""
    asks: list[_Ask] = field(default_factory=list)
    settled: list[tuple[Ticket, int | None]] = field(default_factory=list)
    """With the tokens used; None: the call did not go out."""
    due: bool = False
    """What is settled has waited for `FLUSH_S`."""
    timer: asyncio.TimerHandle | None = None
    task: asyncio.Task[None] | None = None


class Limiter:
    """The rate limits, for all calls of a process: one statement on the store for all that ask at the same time."""

    def __init__(self, db: Database, clock: StoreClock) -> None:
        self._db = db
        self._clock = clock
        self._rows: dict[str, _Row] = {}

    async def take(self, limit: Limit, key: str, tokens: int = 0) -> Ticket:
        """Returns when the call may go out now, without delay: half a second later it should have reached the service.

        key: the call's own; its place is kept under it while it waits. tokens: an estimate, rather high than low.
        Raises NotYet, and the store's errors.
        """
        return (await self.take_all([limit], key, tokens))[0]

    async def take_all(self, limits: Sequence[Limit], key: str, tokens: int = 0) -> tuple[Ticket, ...]:
        """Like `take`, under several limits at once: booked for one time at which all of them have room.

        Taken one after another, a call would lose its place at one limit whenever it waits for another.
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
                # With none behind, the slot began between two questions: those that came too early ask again.
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
        """Says, once, what the call has really used. Written with the next statement on the limit, soon."""
        if ticket.limit.tokens is not None:
            self._note(ticket, tokens)

    def release(self, ticket: Ticket) -> None:
        """Gives a ticket back, instead of settling it: the call certainly did not go out."""
        self._note(ticket, None)

    async def close(self) -> None:
        """Writes what is settled. An error of the store then only means that estimates count for a minute more."""
        for name, row in self._rows.items():
            while row.settled or row.task:  # a statement under way may leave something to be released
                self._flush(name, row)
                if row.task:
                    await row.task

    def _note(self, ticket: Ticket, tokens: int | None) -> None:
        name = ticket.limit.name
        row = self._rows.setdefault(name, _Row())
        row.settled.append((ticket, tokens))
        if row.timer is None:
            row.timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush, name, row)

    def _flush(self, name: str, row: _Row) -> None:
        row.due = bool(row.settled)
        if row.due:
            self._wake(name, row)

    async def _ask(self, limit: Limit, key: str, tokens: int, not_before: int) -> tuple[Placed, float]:
        row = self._rows.setdefault(limit.name, _Row())
        short = sha256(key.encode()).hexdigest()[:12]
        ask = _Ask(limit, short, tokens, not_before, asyncio.get_running_loop().create_future())
        row.asks.append(ask)
        self._wake(limit.name, row)
        try:
            return await ask.answer
        except asyncio.CancelledError:
            # Answered already, but cancelled before it could hear of it.
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
        """Answers all who ask, by one write. Those who come while it has to be tried again are taken along."""
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
                placed = _decide(row.book, now, asks, settled)
                if await self._write(name, row):
                    break
                row.version, row.shared = None, True
                # Of several processes at once one always gets through; this keeps it from being the same one.
                await asyncio.sleep(random.uniform(0, 0.005))
        except BaseException as error:
            # What is settled is not tried again: it may have been written, and counts twice then. Left alone, the
            # estimates stand.
            row.version = None
            for ask in asks:
                if not ask.answer.done():
                    ask.answer.set_exception(error) if isinstance(error, Exception) else ask.answer.cancel()
            if not isinstance(error, Exception):
                raise
            if settled:
                _log.warning("rate limit %s: %d calls go on counting by estimate: %s", name, len(settled), error)
            return
        now += time.monotonic() - since
        for ask, each in zip(asks, placed, strict=True):
            # The store was slow, or this process frozen: the slot is lost to a call that may not go out in it any more.
            late = each.granted and now > each.slot * SLOT_S + LATE_S
            if each.granted and (late or ask.answer.done()):
                self.release(Ticket(ask.limit, each.slot, each.tokens))
            if ask.answer.done():
                continue
            if late:
                row.asks.append(ask)
            else:
                ask.answer.set_result((each, now))

    async def _read(self, name: str, row: _Row) -> None:
        while (found := await self._db.one("SELECT version, book FROM limits WHERE name = ?", name)) is None:
            await self._db.run(
                "INSERT INTO limits (name, version, book) VALUES (?, 0, ?) ON CONFLICT DO NOTHING", name, Book().dump()
            )
        if found[0] == row.version:
            row.shared = False
        else:
            row.version, row.book = found[0], Book.load(found[1])

    async def _write(self, name: str, row: _Row) -> bool:
        """False when another process came between; the book has to be read again."""
        assert row.version is not None, "read before"
        sql = "UPDATE limits SET book = ?, version = version + 1 WHERE name = ? AND version = ?"
        if not await self._db.run(sql, row.book.dump(), name, row.version):
            return False
        row.version += 1
        return True


def _decide(book: Book, now: float, asks: list[_Ask], settled: list[tuple[Ticket, int | None]]) -> list[Placed]:
    advance(book, now)
    for ticket, used in settled:
        if used is None:
            change(book, ticket.slot, -1, -ticket.tokens)
        else:
            settle(book, ticket.slot, ticket.tokens, used)
    return [place(book, ask.limit, ask.key, ask.tokens, ask.not_before) for ask in asks]


def _not_yet(limit: Limit, placed: list[Placed], now: float) -> NotYet:
    # An early look at one of several limits would give up the places at the others.
    at = placed[0].look_at if len(placed) == 1 else placed[0].slot * SLOT_S + AIM_S
    parts = [f"{limit.requests} requests"] * bool(limit.requests) + [f"{limit.tokens} tokens"] * bool(limit.tokens)
    due = datetime.fromtimestamp(placed[0].slot * SLOT_S, UTC)
    return NotYet(at - now, f"rate limit of {limit.name}: {' and '.join(parts)} a minute; next at {due:%H:%M:%S} UTC")


# ------------------------------------------------------------------ for people


@dataclass(frozen=True)
class LimitUsage:
    """A limit as its row has it. `requests` and `tokens`: of the last minute, with estimates of unfinished calls."""

    name: str
    requests: int
    tokens: int
    waiting: int
    last_due: float | None
    """When the last of the waiting calls is due, epoch seconds."""


async def usage(db: Database, now: float) -> list[LimitUsage]:
    """Every limit that was ever used, by name. now: the store's time."""
    rows = await db.all("SELECT name, book FROM limits ORDER BY name")
    return [_usage(name, Book.load(text), now) for name, text in rows]


def _usage(name: str, book: Book, now: float) -> LimitUsage:
    advance(book, now)
    due = [slot for slot, _ in book.waiting.values()]
    for slot, tokens in book.waiting.values():
        change(book, slot, -1, -tokens)
    last = [counted for slot, counted in book.slots.items() if now - 60 < slot * SLOT_S <= now]
    requests, tokens = sum(counted[0] for counted in last), sum(counted[1] for counted in last)
    return LimitUsage(name, requests, tokens, len(due), max(due) * SLOT_S if due else None)
