"""The circuit breaker: when it opens, who probes, who waits and for how long, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from holdfast.authoring.services import BreakerRule
from holdfast.contracts.failures import ErrorType, Failure
from holdfast.reliability.breaker import ANSWERS, JITTER_S, PROBE_S, TRIPS, Breaker, Change, Pass
from holdfast.reliability.ledger import Fenced
from holdfast.reliability.waiting import NotYet
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database, Row, Statement

T = "pharmacy"
RULE = BreakerRule()
BY_SHARE = BreakerRule(failures=None, share=0.5, window_s=60, min_calls=4)
LEASE_S = 22.0
GONE = Failure(ErrorType.UNAVAILABLE, "503 from pharmacy", retry=True, maybe_done=True)


class Hand(StoreClock):
    """The store's clock, moved by hand; reads as the monotonic clock too."""

    def __init__(self) -> None:
        self.at = 1_000_000.0

    async def now(self) -> float:
        return self.at


class Counting(Database):
    """Passes on to a real store and counts the statements."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.dialect = db.dialect
        self.statements = 0

    async def all(self, sql: str, *params: Any) -> list[Row]:
        self.statements += 1
        return await self._db.all(sql, *params)

    async def run(self, sql: str, *params: Any) -> int:
        self.statements += 1
        return await self._db.run(sql, *params)

    async def batch(self, statements: Sequence[Statement]) -> None:
        self.statements += len(statements)
        await self._db.batch(statements)

    async def time(self) -> float:
        return await self._db.time()

    async def close(self) -> None:
        await self._db.close()


@pytest.fixture
def clock() -> Hand:
    return Hand()


@pytest.fixture
def counting(db: Database) -> Counting:
    return Counting(db)


@pytest.fixture
def breaker(counting: Counting, clock: Hand) -> Breaker:
    return Breaker(counting, clock, lambda: clock.at)


def closed(clock: Hand, failures: int = 0, rule: BreakerRule = RULE, target: str = T) -> Pass:
    """The leave that a call gets who saw the breaker closed."""
    return Pass(target, rule, failures=failures, since=clock.at)


async def opened(breaker: Breaker, clock: Hand, rule: BreakerRule = RULE) -> Change:
    changes = [await breaker.failed(closed(clock, rule=rule), GONE) for _ in range(rule.failures or 0)]
    assert changes[:-1] == [None] * (len(changes) - 1)
    assert changes[-1] is not None
    return changes[-1]


async def probing(breaker: Breaker, clock: Hand, holder: str = "run/1") -> Pass:
    """The pass of a prober, of a breaker that opened and is due."""
    await opened(breaker, clock)
    clock.at += RULE.probe_after_s
    passed = await breaker.admit(T, RULE, holder, LEASE_S)
    assert passed.version
    return passed


async def waits(breaker: Breaker, holder: str = "another", rule: BreakerRule = RULE) -> NotYet:
    with pytest.raises(NotYet) as caught:
        await breaker.admit(T, rule, holder, LEASE_S)
    return caught.value


async def state(breaker: Breaker) -> str:
    rows = {row.target: row for row in await breaker.rows()}
    return rows[T].state if T in rows else "closed"


# ------------------------------------------------------------------ opening


async def test_three_failures_in_a_row_open_it(breaker: Breaker, clock: Hand) -> None:
    change = await opened(breaker, clock)
    assert (change.kind, change.target) == ("opened", T)
    assert "3 failures in a row" in change.words
    assert "30 s" in change.words
    assert await state(breaker) == "open"


async def test_a_success_between_failures_begins_the_count_anew(breaker: Breaker, clock: Hand) -> None:
    for failures in (0, 1):
        await breaker.failed(closed(clock, failures), GONE)
    await breaker.succeeded(closed(clock, 2))
    for failures in (0, 1):
        assert await breaker.failed(closed(clock, failures), GONE) is None
    assert await state(breaker) == "closed"


async def test_a_rule_of_one_failure_opens_at_the_first(breaker: Breaker, clock: Hand) -> None:
    change = await opened(breaker, clock, BreakerRule(failures=1))
    assert "1 failure)" in change.words


@pytest.mark.parametrize("kind", ErrorType)
async def test_only_failures_of_the_service_itself_count(breaker: Breaker, clock: Hand, kind: ErrorType) -> None:
    for _ in range(5):
        await breaker.failed(closed(clock), Failure(kind, "words"))
    ill = {"unavailable", "timeout", "connection", "unreachable", "bad_response"}
    assert await state(breaker) == ("open" if kind in ill else "closed")


async def test_a_caller_error_shows_that_the_service_is_well(breaker: Breaker, clock: Hand) -> None:
    await breaker.failed(closed(clock), GONE)
    await breaker.failed(closed(clock, 1), GONE)
    await breaker.failed(closed(clock, 2), Failure(ErrorType.REFUSED, "400"))
    assert await breaker.failed(closed(clock), GONE) is None


async def test_failures_of_calls_in_flight_do_not_put_off_the_probe(breaker: Breaker, clock: Hand) -> None:
    in_flight = closed(clock)
    await opened(breaker, clock)
    clock.at += 10
    assert await breaker.failed(in_flight, GONE) is None
    assert (await waits(breaker)).delay <= 20 + JITTER_S


async def test_a_call_that_hung_since_before_it_opened_does_not_count_after_it_closed(
    breaker: Breaker, clock: Hand
) -> None:
    hung = closed(clock)
    clock.at += 1
    await breaker.succeeded(await probing(breaker, clock))
    clock.at += 1
    for _ in range(3):
        assert await breaker.failed(hung, GONE) is None
    assert await state(breaker) == "closed"
    assert (await opened(breaker, clock)).kind == "opened"  # while calls that began since do


async def test_failures_at_once_are_all_counted(counting: Counting, clock: Hand) -> None:
    breakers = [Breaker(counting, clock, lambda: clock.at) for _ in range(8)]
    rule = BreakerRule(failures=8)
    changes = await asyncio.gather(*(each.failed(closed(clock, rule=rule), GONE) for each in breakers))
    assert [change.kind for change in changes if change] == ["opened"]


async def ends(breaker: Breaker, clock: Hand, how: str) -> list[Change | None]:
    """Calls under a rule with a share, `f` failing and `.` succeeding."""
    passed = closed(clock, rule=BY_SHARE)
    return [await (breaker.failed(passed, GONE) if each == "f" else breaker.succeeded(passed)) for each in how]


async def test_a_share_of_failures_opens_it_once_there_are_enough_calls(breaker: Breaker, clock: Hand) -> None:
    assert await ends(breaker, clock, "f.f") == [None] * 3
    (change,) = await ends(breaker, clock, "f")
    assert change is not None
    assert "3 of 4 calls within 60 s" in change.words


async def test_a_share_below_the_rule_does_not_open_it(breaker: Breaker, clock: Hand) -> None:
    assert await ends(breaker, clock, "..f..f..f") == [None] * 9


async def test_a_window_that_has_passed_says_nothing(breaker: Breaker, clock: Hand) -> None:
    await ends(breaker, clock, "fff")
    clock.at += 61
    assert await ends(breaker, clock, "f..") == [None] * 3
    assert await state(breaker) == "closed"


# ------------------------------------------------------------------ what it costs


async def test_an_answer_through_a_closed_breaker_costs_no_statement(
    breaker: Breaker, counting: Counting, clock: Hand
) -> None:
    await breaker.succeeded(closed(clock))
    await breaker.check(closed(clock))
    await breaker.released(closed(clock))
    assert counting.statements == 0


async def test_a_failure_costs_one_statement_also_when_it_opens(
    breaker: Breaker, counting: Counting, clock: Hand
) -> None:
    await opened(breaker, clock)
    assert counting.statements == 3


async def test_a_call_without_a_target_is_guarded_by_nothing(breaker: Breaker, counting: Counting, clock: Hand) -> None:
    nobody = closed(clock, failures=2, target="")
    await breaker.failed(nobody, GONE)
    await breaker.succeeded(nobody)
    assert counting.statements == 0


# ------------------------------------------------------------------ probing


async def test_while_it_is_open_a_call_learns_when_the_next_probe_is_due(breaker: Breaker, clock: Hand) -> None:
    await opened(breaker, clock)
    clock.at += 12
    wait = await waits(breaker)
    assert 18 <= wait.delay <= 18 + JITTER_S
    assert wait.service == T


async def test_when_due_one_of_many_becomes_the_probe_and_the_others_wait(counting: Counting, clock: Hand) -> None:
    breakers = [Breaker(counting, clock, lambda: clock.at) for _ in range(16)]
    await opened(breakers[0], clock)
    clock.at += 30
    asked = (each.admit(T, RULE, f"run/{n}", LEASE_S) for n, each in enumerate(breakers))
    told = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(each, Pass) for each in told) == 1
    waiting = [each for each in told if isinstance(each, NotYet)]
    assert len(waiting) == 15
    assert all(each.delay <= PROBE_S + JITTER_S for each in waiting)
    assert await state(breakers[0]) == "half-open"


async def test_a_probe_that_is_answered_closes_it(breaker: Breaker, clock: Hand) -> None:
    change = await breaker.succeeded(await probing(breaker, clock))
    assert change is not None
    assert (change.kind, "after 30 s" in change.words) == ("closed", True)
    assert (await breaker.admit(T, RULE, "another", LEASE_S)).version == 0


async def test_after_a_probe_closed_it_three_new_failures_open_it(breaker: Breaker, clock: Hand) -> None:
    await breaker.succeeded(await probing(breaker, clock))
    await opened(breaker, clock)


@pytest.mark.parametrize("kind", sorted(ANSWERS))
async def test_a_probe_that_gets_an_answer_it_does_not_like_closes_it(
    breaker: Breaker, clock: Hand, kind: ErrorType
) -> None:
    change = await breaker.failed(await probing(breaker, clock), Failure(kind, "no"))
    assert change is not None
    assert change.kind == "closed"


@pytest.mark.parametrize("kind", sorted(TRIPS))
async def test_a_probe_that_fails_opens_it_for_as_long_again(breaker: Breaker, clock: Hand, kind: ErrorType) -> None:
    passed = await probing(breaker, clock)
    clock.at += 8
    change = await breaker.failed(passed, Failure(kind, "gone"))
    assert change is not None
    assert change.kind == "reopened"
    assert (await waits(breaker)).delay >= 30


async def test_a_probe_that_fails_by_a_bug_of_ours_leaves_the_probe_to_the_next(breaker: Breaker, clock: Hand) -> None:
    assert await breaker.failed(await probing(breaker, clock), Failure(ErrorType.INTERNAL, "KeyError")) is None
    assert (await breaker.admit(T, RULE, "another", LEASE_S)).version


async def test_a_probe_that_did_not_go_out_is_left_to_the_next(breaker: Breaker, clock: Hand) -> None:
    await breaker.released(await probing(breaker, clock))
    assert (await breaker.admit(T, RULE, "another", LEASE_S)).version


async def test_the_call_of_a_dead_prober_takes_its_probe_over_at_once(breaker: Breaker, clock: Hand) -> None:
    await probing(breaker, clock, "run/1")
    clock.at += 2
    again = await breaker.admit(T, RULE, "run/1", LEASE_S)
    assert await breaker.succeeded(again) is not None


async def test_a_dead_prober_delays_no_longer_than_a_failed_probe(breaker: Breaker, clock: Hand) -> None:
    await probing(breaker, clock)
    clock.at += LEASE_S
    await waits(breaker)  # its probe may have reached the service: the next one is not due yet
    clock.at += RULE.probe_after_s - LEASE_S
    assert (await breaker.admit(T, RULE, "another", LEASE_S)).version


async def test_nobody_else_probes_before_a_lease_longer_than_the_opening_is_over(breaker: Breaker, clock: Hand) -> None:
    await opened(breaker, clock)
    clock.at += 30
    await breaker.admit(T, RULE, "slow", 240.0)
    clock.at += 239
    await waits(breaker)
    clock.at += 1
    assert (await breaker.admit(T, RULE, "another", LEASE_S)).version


async def overtaken(breaker: Breaker, clock: Hand) -> Pass:
    frozen = await probing(breaker, clock)
    clock.at += 60
    await breaker.admit(T, RULE, "another", LEASE_S)
    return frozen


async def test_a_frozen_prober_that_wakes_after_it_was_overtaken_does_not_act(breaker: Breaker, clock: Hand) -> None:
    with pytest.raises(Fenced, match=T):
        await breaker.check(await overtaken(breaker, clock))


async def test_a_prober_that_checks_late_has_its_whole_lease_again(breaker: Breaker, clock: Hand) -> None:
    await opened(breaker, clock)
    clock.at += 30
    passed = await breaker.admit(T, RULE, "slow", 60.0)
    clock.at += 61  # its lease is over, and nobody has come
    await breaker.check(passed)
    clock.at += 59
    await waits(breaker)


async def test_a_prober_that_checks_late_puts_off_the_next_probe(breaker: Breaker, clock: Hand) -> None:
    passed = await probing(breaker, clock)
    clock.at += 29
    await breaker.check(passed)
    clock.at += 29
    await waits(breaker)


LATE: dict[str, Callable[[Breaker, Pass], Awaitable[object]]] = {
    "success": lambda breaker, passed: breaker.succeeded(passed),
    "failure": lambda breaker, passed: breaker.failed(passed, GONE),
    "bug": lambda breaker, passed: breaker.failed(passed, Failure(ErrorType.INTERNAL, "bug")),
    "nothing": lambda breaker, passed: breaker.released(passed),
}


@pytest.mark.parametrize("how", LATE)
async def test_what_an_overtaken_prober_reports_changes_nothing(breaker: Breaker, clock: Hand, how: str) -> None:
    frozen = await overtaken(breaker, clock)
    before = await breaker.rows()
    assert await LATE[how](breaker, frozen) is None
    assert await breaker.rows() == before


async def test_a_probe_is_reported_once(breaker: Breaker, clock: Hand) -> None:
    passed = await probing(breaker, clock)
    await breaker.failed(passed, GONE)
    clock.at += 20
    assert await breaker.failed(passed, GONE) is None
    assert (await waits(breaker)).delay <= 10 + JITTER_S


# ------------------------------------------------------------------ by hand


async def test_tripped_by_hand_nobody_probes_until_it_is_reset_by_hand(breaker: Breaker, clock: Hand) -> None:
    await breaker.trip(T, "they are moving house", "lee")
    clock.at += 3600
    wait = await waits(breaker)
    assert RULE.probe_after_s <= wait.delay <= RULE.probe_after_s + JITTER_S
    assert "tripped by lee: they are moving house" in wait.why
    assert f"breakers reset {T}" in wait.why
    assert await breaker.reset(T, "lee")
    assert (await breaker.admit(T, RULE, "run/1", LEASE_S)).version == 0


async def test_a_trip_by_hand_is_not_undone_by_a_probe_under_way(breaker: Breaker, clock: Hand) -> None:
    passed = await probing(breaker, clock)
    await breaker.trip(T, "moving", "lee")
    assert await breaker.succeeded(passed) is None
    with pytest.raises(Fenced):
        await breaker.check(passed)
    await waits(breaker, "run/1")


async def test_after_a_reset_three_new_failures_open_it(breaker: Breaker, clock: Hand) -> None:
    await opened(breaker, clock)
    await breaker.reset(T, "lee")
    await opened(breaker, clock)


async def test_there_is_nothing_to_reset_for_an_unknown_target(breaker: Breaker) -> None:
    assert not await breaker.reset("nobody", "lee")


# ------------------------------------------------------------------ paused by the service


async def test_a_service_that_asks_for_a_pause_is_left_alone_until_then(breaker: Breaker, clock: Hand) -> None:
    await breaker.pause(T, 7)
    wait = await waits(breaker)
    assert 7 <= wait.delay <= 7 + JITTER_S
    assert wait.service == ""  # no breaker is open: nothing stands in for a wait of some seconds
    clock.at += 7
    assert (await breaker.admit(T, RULE, "run/1", LEASE_S)).version == 0


async def test_of_two_pauses_the_longer_one_holds(breaker: Breaker) -> None:
    await breaker.pause(T, 20)
    await breaker.pause(T, 5)
    assert (await waits(breaker)).delay >= 20


async def test_a_long_pause_is_as_good_as_an_open_breaker(breaker: Breaker) -> None:
    await breaker.pause(T, 3600)
    assert (await waits(breaker)).service == T
    assert list(await breaker.open_targets()) == [T]


async def test_failures_count_on_while_a_service_is_paused(breaker: Breaker, clock: Hand) -> None:
    await breaker.pause(T, 5)
    await opened(breaker, clock)


async def test_a_probe_answered_with_a_wish_for_a_pause_closes_it_and_the_pause_holds(
    breaker: Breaker, clock: Hand
) -> None:
    passed = await probing(breaker, clock)
    await breaker.pause(T, 9)
    await breaker.failed(passed, Failure(ErrorType.RATE_LIMITED, "429", retry=True, retry_after=9))
    assert (await waits(breaker)).delay >= 9
    assert await state(breaker) == "closed"


# ------------------------------------------------------------------ looking at it


async def test_open_targets_are_those_that_let_nothing_through(breaker: Breaker, clock: Hand) -> None:
    await opened(breaker, clock)
    await breaker.trip("fax", "unplugged", "lee")
    await breaker.pause("model", 2)
    await breaker.failed(closed(clock, target="records"), GONE)
    assert sorted(await breaker.open_targets()) == ["fax", T]


async def test_the_words_of_a_wait_do_not_carry_what_the_service_said_to_another_run(
    breaker: Breaker, clock: Hand
) -> None:
    for _ in range(3):
        await breaker.failed(closed(clock), Failure(ErrorType.UNAVAILABLE, "no bed for Ms Doe"))
    assert "Doe" not in (await waits(breaker)).why
    (row,) = await breaker.rows()
    assert "Doe" in row.reason  # which is for operators


async def test_a_breaker_that_never_failed_has_no_row(breaker: Breaker, clock: Hand) -> None:
    await breaker.succeeded(closed(clock))
    await breaker.admit(T, RULE, "run/1", LEASE_S)
    assert await breaker.rows() == []
