"""The book of a rate limit: what went out in the last minute, and what is booked ahead. Pure; `limits` keeps it.

It counts calls and tokens per half-second slot, past and booked. A call gets the earliest slot in which no minute
exceeds a limit: now, and it goes out; or later, and the slot is booked under the call's key.

Promises, as long as no call uses more tokens than were estimated:
- In no sliding minute do more calls or tokens go out than allowed. Saturated, at least 95 % of the rate is used, less
  the fragment into which the next call's tokens do not fit.
- Nobody starves: a booked slot never moves back, so a call waits only for those that were booked before it. Calls
  of equal size are served in their order, except where room comes free later (whoever asks next may have it), and
  except for those that find a spare place.
- A call that comes back more than `LATE_S` after its slot has lost it and is booked anew.

An estimate counts until it is settled. When the process dies before, it counts until its minute is over.
A call whose estimate is above the whole token limit counts as the whole limit: it goes out alone, in an empty minute.

While less than half of a limit is used, a process may book a few places more than it needs, its `Spares`, and let its
next calls out without asking the store. They are counted like calls from the start, so the promises hold with them.
Unused, they are given back within `LATE_S`; those of a process that dies count until their minute is over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import count

from holdfast.services import Limit

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
EARLY_S = 5.0
"""A look before its slot has to be so much earlier to be worth a call's while."""
MEMORY = 0.98
"""Of what was learned about estimates, the part that is kept at each settling."""
SPARE_S = 1.5
"""Seconds after its slot's begin within which a spare place may be used: before LATE_S, what is left is for the way."""
SPARE_SHARE = 0.02
"""Of a limit, what a process may hold as spare places; less than one call: none."""
MOST_SPARES = 32
SPARE_SIZE = 1.5
"""Times a call's tokens: an agent's next call is larger than its last one, by what has been said since."""


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
            "slots": [[slot, *both] for slot, both in self.slots.items()],
            "waiting": self.waiting,
            "learned": [round(self.estimated), round(self.used)],
        }
        return json.dumps(data, separators=(",", ":"))

    def total(self) -> tuple[int, int]:
        """Calls and tokens of all slots."""
        return sum(calls for calls, _ in self.slots.values()), sum(tokens for _, tokens in self.slots.values())


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
        book.slots = {slot: both for slot, both in book.slots.items() if slot > oldest}
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


def counted(limit: Limit, tokens: int) -> int:
    """What an estimate counts as."""
    return 0 if limit.tokens is None else min(tokens, limit.tokens)


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
    tokens = counted(limit, tokens)
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
        calls, busy = book.total()
        if calls + 1 <= most and busy + tokens <= most_tokens:
            return start
    before = [slots.get(slot, nothing) for slot in range(start - SPAN, start)]
    requests = sum(calls for calls, _ in before)
    used = sum(busy for _, busy in before)
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


# ------------------------------------------------------------------ spare places


@dataclass
class Spares:
    """Places of one limit that one process has booked for calls to come, with their tokens in one sum."""

    limit: Limit | None = None
    slot: int = 0
    requests: int = 0
    tokens: int = 0
    used: int = 0
    """How many calls took one."""

    @property
    def left(self) -> bool:
        return bool(self.requests or self.tokens)

    def spend(self, limit: Limit, tokens: int, now: float) -> Placed | None:
        """A place for a call of so many tokens, which goes out now; None when there is none for it."""
        tokens = counted(limit, tokens)
        if not self.requests or tokens > self.tokens or limit != self.limit or self.expired(now):
            return None
        self.requests -= 1
        self.tokens -= tokens
        self.used += 1
        return Placed(self.slot, tokens, granted=True, look_at=now)

    def expired(self, now: float) -> bool:
        return now > self.slot * SLOT_S + SPARE_S

    def wanted(self, now: float, asking: int) -> int:
        """How many the next should be, when so many calls ask for more than what is here.

        As many as were used while these were good; twice as many if they were used up before.
        """
        return self.used if self.expired(now) else 2 * self.used + asking


def book_spares(book: Book, limit: Limit, wanted: int, tokens: int) -> Spares:
    """Counts up to `wanted` more calls like one of so many tokens in the slot of now; none while calls wait."""
    slot, tokens = int(book.at // SLOT_S), counted(limit, round(tokens * SPARE_SIZE))
    requests, busy = book.total()
    bounds = [wanted, MOST_SPARES]
    if limit.requests is not None:
        bounds += [int(limit.requests * SPARE_SHARE), limit.requests // 2 - requests]
    if limit.tokens is not None:
        size = max(tokens, 1)
        bounds += [int(limit.tokens * SPARE_SHARE / size), int((limit.tokens / 2 - busy) / size)]
    number = 0 if book.waiting else max(min(bounds), 0)
    change(book, slot, number, number * tokens)
    return Spares(limit, slot, number, number * tokens)
