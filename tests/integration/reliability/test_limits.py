"""The rate limiter: its book, as pure properties over simulated time; its row, on both databases."""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.authoring.services import Limit
from holdfast.reliability.limit_schedule import (
    AIM_S,
    LATE_S,
    MOST_SPARES,
    SLOT_S,
    SPAN,
    SPARE_S,
    SPARE_SHARE,
    LimitSchedule,
    Placed,
    Spares,
    advance,
    book_spares,
    change,
    place,
    settle,
)
from holdfast.reliability.limits import Limiter, Ticket, usage
from holdfast.reliability.waiting import NotYet
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database
from holdfast.state.opening import open_database
from holdfast.testing.patience import PATIENCE_S

TRANSIT_S = 0.5
"""What a call may take to its service after the end of LATE_S."""
T0 = 1_000_000.0


# ------------------------------------------------------------------ the book


@dataclass
class Traffic:
    """Callers on one book in simulated time: each calls, waits as it is told, calls again after its call has ended."""

    limit: Limit
    rng: random.Random
    tokens: tuple[int, int] = (1, 1)
    """Smallest and largest estimate."""
    used: tuple[float, float] = (1.0, 1.0)
    """Real tokens of a call, as a share of its estimate."""
    late: Callable[[random.Random], float] = lambda _: AIM_S
    """Seconds from a slot's begin, or from an earlier look that was asked for, to the caller's return."""
    call_s: float = 3.0
    pause_s: float = 1.0
    """At most so long between a caller's calls."""
    processes: int = 0
    """Among which the callers are shared out, each with spare places. 0: no spare places."""
    killed: float = 0.0
    """Share of the questions before which the process is killed and begins anew."""
    on_spares: int = 0
    book: LimitSchedule = field(default_factory=LimitSchedule)
    arrivals: list[tuple[float, int, int]] = field(default_factory=list)
    """At the service: time, real tokens, estimate."""
    waits: list[float] = field(default_factory=list)
    asked: int = 0

    def run(self, callers: int, until: float, spread_s: float = 0.5) -> None:
        tie = count()
        events: list[tuple[float, int, str, tuple[int, int, float]]] = []

        def at(when: float, what: str, caller: int, tokens: int, since: float) -> None:
            heapq.heappush(events, (when, next(tie), what, (caller, tokens, since)))

        def new(when: float, caller: int) -> None:
            at(when, "ask", caller, self.rng.randint(*self.tokens), when)

        slots: dict[int, tuple[int, int]] = {}
        spares = [Spares() for _ in range(self.processes)]

        def ask(caller: int, tokens: int, now: float) -> Placed:
            if not self.processes:
                return place(self.book, self.limit, str(caller), tokens)
            if self.rng.random() < self.killed:
                spares[caller % self.processes] = Spares()
            mine = spares[caller % self.processes]
            if placed := mine.spend(self.limit, tokens, now):
                self.on_spares += 1
                return placed
            change(self.book, mine.slot, -mine.requests, -mine.tokens)
            placed = place(self.book, self.limit, str(caller), tokens)
            wanted = mine.wanted(now, 1)
            spares[caller % self.processes] = book_spares(self.book, self.limit, wanted, tokens)
            return placed

        for caller in range(callers):
            new(T0 + self.rng.random() * spread_s, caller)
        while events and events[0][0] < T0 + until:
            now, _, what, (caller, tokens, since) = heapq.heappop(events)
            advance(self.book, now)
            if what == "end":
                slot, estimate = slots.pop(caller)
                settle(self.book, slot, estimate, tokens)
                new(now + self.rng.random() * self.pause_s, caller)
                continue
            self.asked += 1
            placed = ask(caller, tokens, now)
            if not placed.granted:
                at(max(placed.look_at - AIM_S + self.late(self.rng), now + 0.1), "ask", caller, tokens, since)
                continue
            self.waits.append(now - since)
            real = round(tokens * self.rng.uniform(*self.used))
            latest = max(now, placed.slot * SLOT_S + LATE_S) + TRANSIT_S
            self.arrivals.append((self.rng.choice([now, latest, self.rng.uniform(now, latest)]), real, placed.tokens))
            slots[caller] = (placed.slot, placed.tokens)
            at(now + self.rng.uniform(0, self.call_s), "end", caller, real, 0.0)

    def most_in_a_minute(self) -> tuple[int, int]:
        """Requests and tokens in the fullest minute."""
        times = sorted(self.arrivals)
        most = most_tokens = first = tokens = 0
        for last, (at, used, _) in enumerate(times):
            tokens += used
            while times[first][0] <= at - 60:
                tokens -= times[first][1]
                first += 1
            most, most_tokens = max(most, last - first + 1), max(most_tokens, tokens)
        return most, most_tokens

    def share_used(self, begin: float, end: float) -> float:
        """Of the allowed rate of requests or of tokens, the higher."""
        inside = [used for at, used, _ in self.arrivals if T0 + begin <= at < T0 + end]
        minutes = (end - begin) / 60
        share = len(inside) / minutes / self.limit.requests if self.limit.requests else 0.0
        return max(share, sum(inside) / minutes / self.limit.tokens if self.limit.tokens else 0.0)


def waves(requests: int, tokens: int = 0, now: float = T0) -> tuple[LimitSchedule, list[Placed]]:
    """A new book after a hundred calls at once."""
    book = LimitSchedule()
    advance(book, now)
    return book, [place(book, Limit("l", requests), str(n), tokens) for n in range(100)]


@settings(max_examples=60, deadline=None)
@given(
    requests=st.none() | st.integers(1, 12),
    tokens=st.none() | st.integers(10, 500),
    callers=st.integers(1, 30),
    least_used=st.floats(0, 1),
    latest=st.floats(0, 3),
    call_s=st.floats(0, 100),
    seed=st.integers(0, 2**32),
)
def test_no_sliding_minute_exceeds_a_limit(
    requests: int | None, tokens: int | None, callers: int, least_used: float, latest: float, call_s: float, seed: int
) -> None:
    """Whoever comes late or early, however long calls take, and whatever they use of their estimates."""
    traffic = Traffic(
        Limit("l", requests, tokens),
        random.Random(seed),
        tokens=(0, tokens or 10),
        used=(least_used, 1.0),
        late=lambda rng: rng.uniform(-0.5, latest),
        call_s=call_s + 1,
    )
    traffic.run(callers, until=300, spread_s=120)
    most, most_tokens = traffic.most_in_a_minute()
    assert requests is None or most <= requests
    assert tokens is None or most_tokens <= tokens


@settings(max_examples=40, deadline=None)
@given(
    requests=st.none() | st.integers(50, 400),
    size=st.none() | st.integers(1, 30),
    processes=st.integers(1, 5),
    callers=st.integers(1, 60),
    least_used=st.floats(0, 1),
    pause_s=st.floats(0, 90),
    killed=st.sampled_from([0.0, 0.01, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_no_sliding_minute_exceeds_a_limit_when_processes_hold_spare_places(
    requests: int | None,
    size: int | None,
    processes: int,
    callers: int,
    least_used: float,
    pause_s: float,
    killed: float,
    seed: int,
) -> None:
    """Used to the last moment, or not at all; given back, or lost with their process."""
    limit = Limit("l", requests, None if size is None else size * 200)
    traffic = Traffic(
        limit,
        random.Random(seed),
        tokens=(0, size or 1),
        used=(least_used, 1.0),
        call_s=0.5,
        pause_s=pause_s,
        processes=processes,
        killed=killed,
    )
    traffic.run(callers, until=200, spread_s=pause_s)
    most, most_tokens = traffic.most_in_a_minute()
    assert requests is None or most <= requests
    assert limit.tokens is None or most_tokens <= limit.tokens


@pytest.mark.parametrize("processes", [0, 8])
@pytest.mark.parametrize(
    ("limit", "tokens", "callers"),
    [
        (Limit("requests", 60), (1, 1), 90),
        (Limit("many", 600), (1, 1), 1000),
        (Limit("few", 5), (1, 1), 20),
        (Limit("tokens", None, 60_000), (200, 800), 250),
        (Limit("both", 300, 60_000), (50, 450), 600),
    ],
    ids=lambda value: value.name if isinstance(value, Limit) else "",
)
def test_at_least_95_percent_of_a_saturated_limit_are_used(
    limit: Limit, tokens: tuple[int, int], callers: int, processes: int
) -> None:
    traffic = Traffic(limit, random.Random(1), tokens, late=lambda rng: rng.uniform(0, 0.3), processes=processes)
    traffic.run(callers, until=70 + 8 * SPAN * SLOT_S)
    assert traffic.share_used(70, 70 + 8 * SPAN * SLOT_S) >= 0.95


def test_room_that_estimates_leave_unused_is_used_by_those_who_wait() -> None:
    """Without a look before their slots, calls that use 60 % of their estimate would use 60 % of the limit."""
    traffic = Traffic(Limit("l", None, 60_000), random.Random(1), (250, 750), used=(0.4, 0.8))
    traffic.run(200, until=900)
    assert traffic.share_used(200, 900) > 0.85
    assert traffic.asked / len(traffic.arrivals) < 5


def test_an_idle_limit_lets_all_its_calls_out_at_once() -> None:
    _, placed = waves(requests=60)
    assert [each.granted for each in placed] == [True] * 60 + [False] * 40


def test_a_burst_does_not_come_back_as_a_burst() -> None:
    _, placed = waves(requests=60)
    waiting = [each.slot for each in placed if not each.granted]
    assert len(waiting) == len(set(waiting)), "at 60 a minute, twice the mean rate is one call a slot"


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.floats(0, 30), min_size=2, max_size=60),
    requests=st.integers(1, 10),
    tokens=st.none() | st.integers(10, 50),
)
def test_calls_of_equal_size_go_out_in_their_order(gaps: list[float], requests: int, tokens: int | None) -> None:
    book, limit, now, slots = LimitSchedule(), Limit("l", requests, tokens), T0, {}
    due: list[tuple[float, str]] = []
    for number, gap in enumerate(gaps):
        now += gap
        while due and due[0][0] <= now:
            at, key = heapq.heappop(due)
            advance(book, at)
            assert place(book, limit, key, 10).granted, "a waiting call has its slot"
        advance(book, now)
        placed = place(book, limit, str(number), 10)
        slots[number] = placed.slot
        if not placed.granted:
            heapq.heappush(due, (placed.slot * SLOT_S, str(number)))
    assert list(slots.values()) == sorted(slots.values())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), callers=st.integers(1, 60), requests=st.integers(1, 30))
def test_a_call_waits_only_for_those_that_were_booked_before_it(seed: int, callers: int, requests: int) -> None:
    """With `n` calls counted or booked before it: one span more than n / requests, and the pace of those that wait."""
    traffic = Traffic(Limit("l", requests), random.Random(seed), call_s=0.1)
    traffic.run(callers, until=400)
    spans = callers // requests + 1
    pace = callers * max(SLOT_S, SPAN * SLOT_S / 2 / requests)
    assert max(traffic.waits, default=0.0) <= spans * SPAN * SLOT_S + pace + LATE_S


def test_a_booked_call_is_not_moved_back_by_those_that_come_after_it() -> None:
    book, limit = LimitSchedule(), Limit("l", None, 100)
    advance(book, T0)
    place(book, limit, "first", 60)
    large = place(book, limit, "large", 100)
    wanting: set[str] = set()
    for step in range(SPAN):
        advance(book, T0 + step * SLOT_S)
        wanting.add(f"small {step}")
        due = [key for key in wanting if book.waiting.get(key, (0, 0))[0] * SLOT_S <= book.at]
        wanting -= {key for key in due if place(book, limit, key, 1).granted}
    advance(book, large.slot * SLOT_S)
    assert place(book, limit, "large", 100).granted


def test_who_comes_before_its_slot_keeps_it() -> None:
    book, placed = waves(requests=60)
    advance(book, T0 + 10)
    assert place(book, Limit("l", 60), "99", 0).slot == placed[99].slot


def test_who_comes_within_two_seconds_of_its_slot_has_it() -> None:
    book, placed = waves(requests=60)
    advance(book, placed[99].slot * SLOT_S + LATE_S)
    assert place(book, Limit("l", 60), "99", 0) == Placed(
        placed[99].slot, 0, granted=True, look_at=placed[99].slot * SLOT_S + AIM_S
    )


def test_who_comes_later_is_booked_anew() -> None:
    book, _ = waves(requests=1)
    advance(book, T0 + SPAN * SLOT_S + LATE_S + 0.01)
    assert not place(book, Limit("l", 1), "1", 0).granted


def test_who_looks_early_moves_up_to_room_that_has_come_free() -> None:
    book, limit = LimitSchedule(), Limit("l", None, 100)
    advance(book, T0)
    first = place(book, limit, "first", 100)
    assert not place(book, limit, "second", 50).granted
    settle(book, first.slot, 100, 40)
    advance(book, T0 + 5)
    assert place(book, limit, "second", 50).granted


def test_a_call_larger_than_the_limit_goes_out_alone() -> None:
    book, limit = LimitSchedule(), Limit("l", None, 100)
    advance(book, T0)
    assert place(book, limit, "small", 1).granted
    large = place(book, limit, "large", 1000)
    assert (large.granted, large.tokens) == (False, 100)
    advance(book, large.slot * SLOT_S)
    assert place(book, limit, "large", 1000).granted
    assert place(book, limit, "after", 1).slot == large.slot + SPAN


def test_a_waiter_whose_room_others_used_beyond_their_estimates_does_not_go_over() -> None:
    book, limit = LimitSchedule(), Limit("l", None, 100)
    advance(book, T0)
    place(book, limit, "first", 60)
    advance(book, T0 + 30)
    second = place(book, limit, "second", 40)
    third = place(book, limit, "third", 60)
    settle(book, second.slot, 40, 70)
    advance(book, third.slot * SLOT_S)
    again = place(book, limit, "third", 60)
    assert not again.granted
    assert again.slot == second.slot + SPAN


def test_a_lowered_limit_holds_for_those_that_were_booked_under_the_old_one() -> None:
    book, placed = waves(requests=50)
    now, out = placed[-1].slot * SLOT_S, 0
    for number in range(50, 100):
        advance(book, max(placed[number].slot * SLOT_S, book.at))
        out += place(book, Limit("l", 5), str(number), 0).granted
    assert book.at <= now
    assert out <= 5


def test_far_from_the_limit_nearly_all_calls_go_out_on_spare_places() -> None:
    traffic = Traffic(Limit("l", 6000, 600_000), random.Random(1), (50, 100), call_s=0.1, pause_s=0.2, processes=2)
    traffic.run(10, until=30)
    assert traffic.on_spares / len(traffic.arrivals) > 0.9


def test_a_spare_place_may_be_used_until_its_call_could_still_arrive_in_time() -> None:
    book, limit = LimitSchedule(), Limit("l", 1000)
    advance(book, T0)
    spares = book_spares(book, limit, 2, 0)
    assert spares.spend(limit, 0, T0 + SPARE_S) == Placed(int(T0 / SLOT_S), 0, granted=True, look_at=T0 + SPARE_S)
    assert spares.spend(limit, 0, T0 + SPARE_S + 0.01) is None
    assert SPARE_S < LATE_S


def test_the_tokens_of_spare_places_are_shared_by_calls_of_different_size() -> None:
    book, limit = LimitSchedule(), Limit("l", None, 100_000)
    advance(book, T0)
    spares = book_spares(book, limit, 4, 100)
    assert book.total() == (4, 600)
    assert [spares.spend(limit, tokens, T0) is not None for tokens in (450, 200, 150, 1)] == [True, False, True, False]


@settings(deadline=None)
@given(
    requests=st.none() | st.integers(1, 1000),
    tokens=st.none() | st.integers(1, 10_000),
    size=st.integers(0, 100),
    before=st.integers(0, 1000),
    wanted=st.integers(0, 100),
)
def test_spare_places_are_few_and_only_while_less_than_half_is_used(
    requests: int | None, tokens: int | None, size: int, before: int, wanted: int
) -> None:
    book, limit = LimitSchedule(), Limit("l", requests, tokens)
    advance(book, T0)
    change(book, int(T0 / SLOT_S), before, before)
    spares = book_spares(book, limit, wanted, size)
    assert spares.requests <= min(wanted, MOST_SPARES)
    if spares.requests:
        calls, busy = book.total()
        assert requests is None or (spares.requests <= requests * SPARE_SHARE and calls <= requests / 2)
        assert tokens is None or (spares.tokens <= tokens * SPARE_SHARE and busy <= tokens / 2)


def test_no_spare_place_is_booked_while_a_call_waits() -> None:
    book, limit = LimitSchedule(), Limit("l", None, 10_000)
    advance(book, T0)
    book.waiting["somebody"] = (int(T0 / SLOT_S) + 1, 10)
    assert book_spares(book, limit, 10, 1).requests == 0


def test_spare_places_become_more_while_they_are_used_up_and_none_when_they_expire() -> None:
    book, limit, wanted = LimitSchedule(), Limit("l", 100_000), []
    spares = Spares()
    for now in (T0, T0 + 0.1, T0 + 0.2, T0 + 0.3):
        advance(book, now)
        wanted.append(spares.wanted(now, 1))
        spares = book_spares(book, limit, wanted[-1], 0)
        while now < T0 + 0.3 and spares.spend(limit, 0, now):
            pass
    assert wanted == [0, 1, 3, 7]
    assert spares.wanted(T0 + SPARE_S + 0.4, 1) == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_book_survives_its_text(seed: int) -> None:
    traffic = Traffic(Limit("l", 5, 100), random.Random(seed), (1, 50), used=(0.3, 1.0))
    traffic.run(20, until=100)
    again = LimitSchedule.load(traffic.book.dump())
    assert (again.slots, again.waiting) == (traffic.book.slots, traffic.book.waiting)
    assert again.at == pytest.approx(traffic.book.at, abs=0.001)


# ------------------------------------------------------------------ the row


@pytest.fixture
def limiter(db: Database) -> Limiter:
    return Limiter(db, StoreClock(db))


async def counted(db: Database, name: str = "l") -> tuple[int, int]:
    """Requests and tokens that the row has."""
    row = await db.one("SELECT book FROM limits WHERE name = ?", name)
    slots = LimitSchedule.load(row[0]).slots.values() if row else ()
    return sum(each[0] for each in slots), sum(each[1] for each in slots)


async def ask(limiter: Limiter, limit: Limit, key: str, tokens: int = 0) -> Ticket | NotYet:
    try:
        return await limiter.take(limit, key, tokens)
    except NotYet as wait:
        return wait


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await true():
            await asyncio.sleep(0.005)


class Later(StoreClock):
    """The store's clock, some seconds ahead."""

    ahead = 0.0

    async def now(self) -> float:
        return await super().now() + self.ahead


async def test_who_has_to_wait_learns_when_and_why(limiter: Limiter) -> None:
    limit = Limit("mail@north", 1, 500)
    await limiter.take(limit, "a")
    with pytest.raises(
        NotYet, match=r"rate limit of mail@north: 1 requests and 500 tokens a minute; next at \d\d:"
    ) as e:
        await limiter.take(limit, "b")
    assert 61 < e.value.delay < 63


async def test_calls_of_one_process_at_the_same_time_share_statements(db: Database, limiter: Limiter) -> None:
    limit = Limit("l", 150)
    answers = await asyncio.gather(*(ask(limiter, limit, str(n)) for n in range(200)))
    assert sum(isinstance(each, Ticket) for each in answers) == 150
    assert await db.one("SELECT version FROM limits") == (1,)


async def test_processes_on_one_store_never_let_more_out_than_allowed_and_nothing_is_lost(store_url: str) -> None:
    limit, stores = Limit("l", 60, 10_000), [await open_database(store_url) for _ in range(4)]
    try:
        limiters = [Limiter(db, StoreClock(db)) for db in stores]

        async def agent(number: int) -> int:
            out = 0
            for turn in range(3):
                answer = await ask(limiters[number % 4], limit, f"{number}/{turn}", 100)
                if isinstance(answer, Ticket):
                    limiters[number % 4].settle(answer, 50)
                    out += 1
            return out

        out = sum(await asyncio.gather(*(agent(n) for n in range(40))))
        for limiter in limiters:
            await limiter.close()
        (used,) = await usage(stores[0], await stores[0].time())
        assert (out, used.requests, used.tokens, used.waiting) == (60, 60, 3000, 60)
    finally:
        for db in stores:
            await db.close()


async def test_a_place_is_kept_for_the_key_whichever_process_comes_with_it(db: Database) -> None:
    clock, limit = Later(db), Limit("l", 1)
    one, other = Limiter(db, clock), Limiter(db, clock)
    await one.take(limit, "first")
    waits = [await ask(one, limit, key) for key in ("second", "third")]
    assert all(isinstance(each, NotYet) for each in waits)
    clock.ahead = 63.0
    assert isinstance(await ask(one, limit, "third"), NotYet)
    assert isinstance(await ask(other, limit, "second"), Ticket)


async def test_what_is_settled_is_written_soon_without_another_call(db: Database, limiter: Limiter) -> None:
    ticket = await limiter.take(Limit("l", None, 1000), "a", 800)
    limiter.settle(ticket, 300)

    async def written() -> bool:
        return await counted(db) == (1, 300)

    await until(written)


async def test_what_is_settled_goes_with_the_next_call_and_makes_room_for_it(db: Database, limiter: Limiter) -> None:
    limit = Limit("l", None, 1000)
    limiter.settle(await limiter.take(limit, "a", 800), 300)
    await limiter.take(limit, "b", 700)
    assert (await counted(db), await db.one("SELECT version FROM limits")) == ((2, 1000), (2,))


async def test_far_from_the_limit_a_hundred_calls_need_few_statements(db: Database, limiter: Limiter) -> None:
    limits = [Limit("model", 100_000, 10_000_000), Limit("tool", 100_000)]
    for number in range(100):
        for ticket in await limiter.take_all(limits, str(number), 100 + number):
            limiter.settle(ticket, 50)
    rows = await db.all("SELECT version FROM limits ORDER BY name")
    assert all(version <= 15 for (version,) in rows)
    await limiter.close()
    assert (await counted(db, "model"), await counted(db, "tool")) == ((100, 5000), (100, 0))


async def test_spare_places_that_nobody_used_are_given_back_without_another_call(
    db: Database, limiter: Limiter
) -> None:
    for key in "abcd":
        await limiter.take(Limit("l", 1000), key)
    assert (await counted(db))[0] > 4

    async def given_back() -> bool:
        return await counted(db) == (4, 0)

    await until(given_back)


async def test_spare_places_of_a_killed_process_go_on_counting(db: Database) -> None:
    clock, limit = Later(db), Limit("l", 100)
    killed, other = Limiter(db, clock), Limiter(db, clock)
    for key in "ab":
        await killed.take(limit, key)
    answers = [await ask(other, limit, str(n)) for n in range(100)]
    spare = (await counted(db))[0] - 2 - sum(isinstance(each, Ticket) for each in answers)
    assert spare >= 1


async def test_a_spare_place_is_not_used_late(db: Database) -> None:
    clock, limit = Later(db), Limit("l", 1000)
    limiter = Limiter(db, clock)
    for key in "abc":
        await limiter.take(limit, key)
    clock.ahead = 5.0
    assert (await limiter.take(limit, "d")).slot * SLOT_S > await clock.now() - 2 * SLOT_S


async def test_calls_that_come_while_a_statement_runs_share_its_spare_places(
    db: Database, limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, run, more = Limit("l", 1000), db.run, []
    await limiter.take(limit, "a")

    async def busy(sql: str, *params: object) -> int:
        changed = await run(sql, *params)
        if not more:
            more.append(asyncio.ensure_future(limiter.take(limit, "c")))
            await asyncio.sleep(0)
        return changed

    monkeypatch.setattr(db, "run", busy)
    await limiter.take(limit, "b")
    await more[0]
    assert await db.one("SELECT version FROM limits") == (2,)


async def test_closing_writes_what_is_settled(db: Database, limiter: Limiter) -> None:
    limiter.settle(await limiter.take(Limit("l", None, 1000), "a", 800), 300)
    await limiter.close()
    assert await counted(db) == (1, 300)


async def test_a_call_that_did_not_go_out_after_all_gives_its_place_back(limiter: Limiter) -> None:
    limit = Limit("l", 1, 100)
    limiter.release(await limiter.take(limit, "a", 100))
    await limiter.take(limit, "b", 100)


@pytest.mark.parametrize("when", ["before", "while", "written", "answered"])
async def test_a_cancelled_caller_leaves_nothing_counted(
    db: Database, limiter: Limiter, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, run = Limit("l", 10, 1000), db.run
    await limiter.take(limit, "a")
    task = asyncio.ensure_future(limiter.take(limit, "b", 10))

    async def cancelling(sql: str, *params: object) -> int:
        if when == "while":
            task.cancel()
        changed = await run(sql, *params)
        if when == "written":
            task.cancel()
        if when == "answered":  # after the answer is set, before its caller goes on
            asyncio.get_running_loop().call_soon(task.cancel)
        return changed

    monkeypatch.setattr(db, "run", cancelling)
    if when == "before":
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await limiter.close()
    assert await counted(db) == (1, 0)


async def test_an_error_of_the_store_reaches_all_who_ask_and_the_next_call_works(db: Database) -> None:
    limiter, limit = Limiter(db, StoreClock(db)), Limit("l", 10)
    await db.run("ALTER TABLE limits RENAME TO gone")
    answers = await asyncio.gather(*(limiter.take(limit, str(n)) for n in range(5)), return_exceptions=True)
    assert all(isinstance(each, Exception) and "limits" in str(each) for each in answers)
    await db.run("ALTER TABLE gone RENAME TO limits")
    assert isinstance(await limiter.take(limit, "0"), Ticket)


async def test_under_two_limits_a_call_is_booked_for_a_time_at_which_both_have_room(db: Database) -> None:
    clock = Later(db)
    limiter, service, tool = Limiter(db, clock), Limit("service", 2), Limit("tool", 1)
    await limiter.take_all([service, tool], "a")
    delays = []
    for key in "bc":
        with pytest.raises(NotYet, match="of tool") as waits:
            await limiter.take_all([service, tool], key)
        delays.append(waits.value.delay)
    for number in range(8):  # others want the service as well
        await ask(limiter, service, f"other {number}")
    for key, clock.ahead in zip("bc", delays, strict=True):
        tickets = await limiter.take_all([service, tool], key)
        assert [ticket.limit for ticket in tickets] == [service, tool]


async def test_a_slot_is_lost_to_a_call_that_the_store_held_up(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let out late, it would reach the service in a minute in which it is not counted."""
    limiter, run, stalls = Limiter(db, StoreClock(db)), db.run, []

    async def stalled(sql: str, *params: object) -> int:
        changed = await run(sql, *params)
        if sql.startswith("UPDATE") and not stalls:
            stalls.append(time.monotonic())
            monkeypatch.setattr(time, "monotonic", lambda clock=time.monotonic: clock() + LATE_S + 1)
        return changed

    monkeypatch.setattr(db, "run", stalled)
    ticket = await limiter.take(Limit("l", 10), "a")
    assert ticket.slot * SLOT_S > (await db.time())
    assert await counted(db) == (1, 0)


async def test_usage_tells_what_was_used_and_who_waits(db: Database, limiter: Limiter) -> None:
    limit = Limit("l", 2, 1000)
    answers = [await ask(limiter, limit, str(n), 100) for n in range(4)]
    assert [type(each) for each in answers] == [Ticket, Ticket, NotYet, NotYet]
    (seen,) = await usage(db, now := await db.time())
    assert (seen.name, seen.requests, seen.tokens, seen.waiting) == ("l", 2, 200, 2)
    assert seen.last_due is not None
    assert seen.last_due - now == pytest.approx(SPAN * SLOT_S, abs=3)
