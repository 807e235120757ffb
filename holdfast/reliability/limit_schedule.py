"""The schedule of a rate limit: what went out in the last minute, and what is booked ahead.

This module does no I/O; `limits` stores the schedule. The schedule counts calls and tokens per half-second slot, past
and booked. A call gets the earliest slot with which no minute exceeds a limit. If that is the current slot, the call
goes out; if it is later, the slot is booked under the call's key.

Guarantees, as long as no call uses more tokens than estimated:
- In no sliding minute do more calls or tokens go out than allowed. A saturated limit uses at least 95 % of its rate,
  less the rest into which the next call's tokens do not fit.
- No call starves: a booked slot never moves back, so a call waits only for those that were booked before it. Calls
  of equal size go out in order, with two exceptions: the next call that asks may get capacity that comes free later,
  and a call may find a spare place.
- A call that comes back more than `LATE_S` after its slot has lost the slot and is booked again.

An estimate counts until it is settled. If the process dies before that, it counts until its minute is over.
A call whose estimate is above the whole token limit counts as the whole limit: it goes out alone, in an empty minute.

While less than half of a limit is used, a process can book a few more places than it needs, its `Spares`, and send its
next calls without asking the store. Spare places count like calls from the start, so the guarantees include them.
The process gives back unused ones within `LATE_S`; those of a process that dies count until their minute is over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import count

from holdfast.authoring.services import Limit

SLOT_S = 0.5
LATE_S = 2.0
"""Seconds after the start of its slot within which a call has to go out."""
SPAN = 125
"""Number of consecutive slots that together must not exceed the limit: 62.5 s.

A call counted in a slot goes out within LATE_S of the slot's start and reaches the service at most 0.5 s later (the
clocks of workers may differ by a part of that). So two calls whose slots are SPAN or more apart arrive at least
62.5 - 2.5 = 60 s apart, never within one minute. The price: a saturated limit is used to 60 / 62.5 = 96 %.
"""
PEAK = 2
"""While calls wait, they go out at up to this multiple of the mean rate, so that a burst does not come back as one."""
AIM_S = 0.05
"""Seconds after the start of its slot at which a waiting call comes back. A timer that fires early costs another
round."""
EARLY_S = 5.0
"""Seconds. A look before the booked slot has to be at least this much earlier to be worth its cost."""
MEMORY = 0.98
"""Weight of what was learned about estimates before, each time a call is settled."""
SPARE_S = 1.5
"""Seconds after the start of its slot in which a spare place can be used; the rest up to LATE_S is for sending."""
SPARE_SHARE = 0.02
"""Share of a limit that a process may hold as spare places. If that is less than one call, it holds none."""
MOST_SPARES = 32
SPARE_SIZE = 1.5
"""Tokens of a spare place, as a multiple of the last call's: an agent's next call is larger, as its history grows."""


@dataclass
class LimitSchedule:
    """The state of one limit. `slots`: calls and tokens by slot (epoch seconds // SLOT_S), including booked slots."""

    at: float = 0.0
    """The latest time seen; it never goes back. If the store's clock is set back, it stays until the clock is there."""
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    waiting: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Booked slot and tokens of each waiting call, by digest of its key."""
    estimated: float = 0.0
    used: float = 0.0
    """Tokens of recently settled calls: estimated and real."""

    @classmethod
    def load(cls, text: str) -> LimitSchedule:
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
        """Returns the calls and tokens of all slots."""
        return sum(calls for calls, _ in self.slots.values()), sum(tokens for _, tokens in self.slots.values())


@dataclass(frozen=True)
class Placed:
    """The place of a call: it goes out now (`granted`), or it is booked."""

    slot: int
    tokens: int
    """The tokens counted in the slot."""
    granted: bool
    look_at: float
    """When to come back, epoch seconds."""


def advance(book: LimitSchedule, now: float) -> None:
    """Advances the schedule: removes slots that no longer count, and bookings whose call did not come."""
    before, book.at = book.at, max(book.at, now)
    if book.at // SLOT_S > before // SLOT_S:
        oldest = int(book.at // SLOT_S) - SPAN
        book.slots = {slot: both for slot, both in book.slots.items() if slot > oldest}
    for key, (slot, tokens) in list(book.waiting.items()):
        if slot * SLOT_S + LATE_S < book.at:
            del book.waiting[key]
            change(book, slot, -1, -tokens)


def change(book: LimitSchedule, slot: int, requests: int, tokens: int) -> None:
    """Adds to, or subtracts from, the counts of a slot. Ignores a slot that no longer counts."""
    if slot <= int(book.at // SLOT_S) - SPAN:
        return
    before = book.slots.get(slot, (0, 0))
    after = (max(before[0] + requests, 0), max(before[1] + tokens, 0))
    if after == (0, 0):
        book.slots.pop(slot, None)
    else:
        book.slots[slot] = after


def counted(limit: Limit, tokens: int) -> int:
    """Returns the tokens that an estimate counts as."""
    return 0 if limit.tokens is None else min(tokens, limit.tokens)


def settle(book: LimitSchedule, slot: int, estimated: int, used: int) -> None:
    """Replaces a call's estimate with its real usage, and learns how far off estimates are."""
    change(book, slot, 0, used - estimated)
    book.estimated = book.estimated * MEMORY + estimated
    book.used = book.used * MEMORY + used


def place(book: LimitSchedule, limit: Limit, key: str, tokens: int, not_before: int = 0) -> Placed:
    """Grants the call with this key a place now, if the schedule (advanced to now) has capacity, or books a slot.

    A key that was booked keeps its slot, or gets an earlier one that has come free.
    not_before: the first slot in which the call may go out.
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
            slot = min(slot, held[0])  # it never moves back, even if other calls use more than estimated
    change(book, slot, 1, tokens)
    granted = slot <= this
    if not granted:
        book.waiting[key] = (slot, tokens)
    return Placed(slot, tokens, granted, _look_at(book, slot))


def _earliest(book: LimitSchedule, limit: Limit, tokens: int, start: int, *, paced: bool) -> int:
    """Returns the first slot from `start` on in which a call of so many tokens breaks no limit, now or later.

    It also respects the calls that are booked after it. paced: allow at most `PEAK` times the mean rate in the slot.
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
        elif end >= found + SPAN - 1:  # every span that contains `found` was checked
            calls, busy = slots.get(found, nothing)
            crowded = (calls + 1) * SPAN > PEAK * most or (busy + tokens) * SPAN > PEAK * most_tokens
            if not (paced and calls and crowded):
                return found
            found += 1
    raise AssertionError("unreachable: after the last slot of the schedule there is capacity")


def _look_at(book: LimitSchedule, slot: int) -> float:
    """Returns when the call should come back.

    When estimates are too high, capacity comes free before the booked slot and is lost unless a call looks earlier. The
    earliest look is after half of the remaining time, so that a call looks only a few times.
    """
    begin = slot * SLOT_S
    ratio = max(0.5, min(1.0, book.used / book.estimated)) if book.estimated else 1.0
    early = (begin - book.at) * (1 - ratio)
    return begin - early if early >= EARLY_S else begin + AIM_S


# ------------------------------------------------------------------ spare places


@dataclass
class Spares:
    """Places of one limit that a process has booked for its next calls. `tokens` is the sum for all of them."""

    limit: Limit | None = None
    slot: int = 0
    requests: int = 0
    tokens: int = 0
    used: int = 0
    """How many calls took a place."""

    @property
    def left(self) -> bool:
        return bool(self.requests or self.tokens)

    def spend(self, limit: Limit, tokens: int, now: float) -> Placed | None:
        """Takes a place for a call of so many tokens that goes out now. None when there is no such place."""
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
        """Returns how many places to book next, when so many calls ask for more than what is left.

        As many as were used while these were valid; twice as many if they were used up before they expired.
        """
        return self.used if self.expired(now) else 2 * self.used + asking


def book_spares(book: LimitSchedule, limit: Limit, wanted: int, tokens: int) -> Spares:
    """Books up to `wanted` spare places for calls of so many tokens in the current slot; none while calls wait."""
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
