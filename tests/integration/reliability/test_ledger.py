"""The effect ledger: one right to act per key at a time, one result per key for ever."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from holdfast.contracts.failures import ErrorType, Failure
from holdfast.contracts.profile import Effect
from holdfast.reliability.ledger import Call, Fenced, Grant, KeyConflict, Ledger, Look, Settled, State, tool_call
from holdfast.state.database import Database

DONE = Settled(State.DONE, {"order": 7})
GONE = Failure(ErrorType.UNAVAILABLE, "gone", retry=True, maybe_done=True)


@pytest.fixture
def ledger(db: Database) -> Ledger:
    return Ledger(db, worker="w1")


def book(key: str = "run/1", **arguments: object) -> Call:
    return tool_call(key, "run", "book", Effect.IDEMPOTENT, arguments, seq=1)


async def granted(ledger: Ledger, call: Call) -> Grant:
    grant = await ledger.reserve(call)
    assert isinstance(grant, Grant), grant
    return grant


async def test_a_new_key_may_act_and_is_not_in_doubt(ledger: Ledger) -> None:
    assert await granted(ledger, book()) == Grant(attempt=1, failures=0, doubtful=False)


async def test_a_recorded_result_is_returned_for_its_key_for_ever(ledger: Ledger) -> None:
    grant = await granted(ledger, book())
    await ledger.record(book(), grant.attempt, State.DONE, 0, DONE, None)
    assert await ledger.reserve(book()) == await ledger.reserve(book()) == DONE


async def test_a_reservation_that_nobody_recorded_leaves_the_next_attempt_in_doubt(ledger: Ledger) -> None:
    await granted(ledger, book())
    assert await granted(ledger, book()) == Grant(attempt=2, failures=0, doubtful=True)


@pytest.mark.parametrize(("state", "doubtful"), [(State.FAILED, False), (State.UNKNOWN, True)])
async def test_what_a_failure_says_decides_whether_the_retry_is_in_doubt(
    ledger: Ledger, state: State, doubtful: bool
) -> None:
    grant = await granted(ledger, book())
    await ledger.record(book(), grant.attempt, state, 1, None, GONE)
    assert await granted(ledger, book()) == Grant(attempt=2, failures=1, doubtful=doubtful)


async def test_an_attempt_that_was_overtaken_can_neither_go_on_nor_record(ledger: Ledger) -> None:
    frozen = await granted(ledger, book())
    second = await granted(ledger, book())
    with pytest.raises(Fenced):
        await ledger.renew(book(), frozen.attempt)
    with pytest.raises(Fenced):
        await ledger.record(book(), frozen.attempt, State.FAILED, 1, Settled(State.FAILED), None)
    await ledger.renew(book(), second.attempt)
    await ledger.record(book(), second.attempt, State.DONE, 0, DONE, None)
    with pytest.raises(Fenced):
        await ledger.record(book(), second.attempt, State.DONE, 0, DONE, None)
    assert await ledger.reserve(book()) == DONE


async def test_the_same_key_with_other_arguments_is_an_error(ledger: Ledger) -> None:
    grant = await granted(ledger, book(slot=1))
    with pytest.raises(KeyConflict, match="run/1"):
        await ledger.reserve(book(slot=2))
    with pytest.raises(KeyConflict):
        await ledger.reserve(tool_call("run/1", "run", "cancel", Effect.IDEMPOTENT, {"slot": 1}))
    await ledger.record(book(slot=1), grant.attempt, State.DONE, 0, DONE, None)
    with pytest.raises(KeyConflict):
        await ledger.reserve(book(slot=2))


async def test_twenty_at_once_get_twenty_different_attempts(ledger: Ledger) -> None:
    grants = await asyncio.gather(*(granted(ledger, book()) for _ in range(20)))
    assert sorted(g.attempt for g in grants) == list(range(1, 21))
    assert [g.doubtful for g in sorted(grants, key=lambda g: g.attempt)] == [False] + [True] * 19


# ------------------------------------------------------------ closing a key before its undo


async def test_a_key_that_was_never_reserved_is_closed_to_late_comers(ledger: Ledger) -> None:
    assert (await ledger.seize(book(), "undone first"))[:2] == (State.FAILED, None)
    late = await ledger.reserve(book())
    assert isinstance(late, Settled)
    assert (late.state, late.error) == (State.FAILED, "undone first")


async def test_an_attempt_in_flight_loses_its_right_and_its_effect_is_unknown(ledger: Ledger) -> None:
    frozen = await granted(ledger, book())
    assert (await ledger.seize(book(), "undone"))[:2] == (State.UNKNOWN, None)
    with pytest.raises(Fenced):
        await ledger.renew(book(), frozen.attempt)
    with pytest.raises(Fenced):
        await ledger.record(book(), frozen.attempt, State.DONE, 0, DONE, None)


@pytest.mark.parametrize("state", [State.RESERVED, State.FAILED, State.UNKNOWN])
async def test_after_it_no_retry_gets_the_right_to_act(ledger: Ledger, state: State) -> None:
    grant = await granted(ledger, book())
    if state is not State.RESERVED:
        await ledger.record(book(), grant.attempt, state, 1, None, GONE)
    left, _, _ = await ledger.seize(book(), "undone")
    late = await ledger.reserve(book())
    assert isinstance(late, Settled), "the undo has run: a retry would act again with nobody left to undo it"
    assert late.state is left is (State.FAILED if state is State.FAILED else State.UNKNOWN)


async def test_the_undo_gets_the_result_also_when_it_is_tried_again(ledger: Ledger) -> None:
    grant = await granted(ledger, book())
    await ledger.record(book(), grant.attempt, State.DONE, 0, DONE, None)
    assert (await ledger.seize(book(), "undone"))[:2] == (State.DONE, {"order": 7})
    await ledger.compensated("run/1")
    assert (await ledger.seize(book(), "undone"))[:2] == (State.COMPENSATED, {"order": 7})


async def test_what_never_happened_is_not_marked_as_undone(ledger: Ledger) -> None:
    await ledger.seize(book(), "undone")
    await ledger.compensated("run/1")
    assert [e.state for e in await ledger.entries("run")] == [State.FAILED]


# ------------------------------------------------------------ reads and model calls: no reservation


READ = replace(book(), effect=Effect.READ)
QUESTION = Call("run/turn-1", "run", "model", "turn-1", Effect.READ, None, "asked")


async def test_failures_of_a_read_are_counted_and_marked_as_done_once_it_recovers(ledger: Ledger) -> None:
    assert await ledger.look(READ, 0.0) == Look(settled=None, failures=0, shut=False, breaker_failures=0)
    assert await ledger.entries("run") == [], "a look leaves no row"
    assert [await ledger.count_failure(READ, GONE) for _ in range(3)] == [1, 2, 3]
    assert (await ledger.look(READ, 0.0)).failures == 3
    await ledger.recovered(READ)
    (row,) = await ledger.entries("run")
    assert (row.state, row.failures, row.error) == (State.DONE, 3, "unavailable: gone")


async def test_the_first_answer_that_is_kept_is_everybodys(ledger: Ledger) -> None:
    await ledger.count_failure(QUESTION, GONE)
    first = await ledger.keep(QUESTION, "yes")
    assert (first.state, first.result, first.failures) == (State.DONE, "yes", 1)
    assert await ledger.keep(QUESTION, "no") == first
    assert (await ledger.look(QUESTION, 0.0)).settled == await ledger.settled(QUESTION) == first
    await ledger.count_failure(QUESTION, GONE)
    assert await ledger.settled(QUESTION) == first, "an attempt that fails late changes nothing"


async def test_an_answer_to_another_question_is_neither_kept_nor_found(ledger: Ledger) -> None:
    await ledger.keep(QUESTION, "yes")
    other = replace(QUESTION, digest="asked otherwise")
    with pytest.raises(KeyConflict):
        await ledger.look(other, 0.0)
    with pytest.raises(KeyConflict):
        await ledger.keep(other, "no")


async def test_forgotten_failures_leave_the_next_try_all_its_retries(ledger: Ledger) -> None:
    for _ in range(3):
        await ledger.count_failure(QUESTION, GONE)
    await ledger.forget_failures(QUESTION)
    assert await ledger.count_failure(QUESTION, GONE) == 1


# ------------------------------------------------------------ what a person says, and standing in


async def test_a_key_that_certainly_did_nothing_gives_way_for_good(ledger: Ledger) -> None:
    assert await ledger.give_way(book(), "its service is down")
    assert await ledger.give_way(book(), "a crash came between")
    late = await ledger.reserve(book())
    assert isinstance(late, Settled)
    assert (late.state, late.error) == (State.FAILED, "its service is down")


@pytest.mark.parametrize("state", [State.RESERVED, State.UNKNOWN, State.DONE])
async def test_a_key_that_may_have_acted_gives_way_to_nobody(ledger: Ledger, state: State) -> None:
    grant = await granted(ledger, book())
    if state is not State.RESERVED:
        await ledger.record(book(), grant.attempt, state, 0, DONE if state is State.DONE else None, None)
    assert not await ledger.give_way(book(), "its service is down")


@pytest.mark.parametrize("left", [State.RESERVED, State.UNKNOWN, State.FAILED])
@pytest.mark.parametrize("happened", [True, False])
async def test_what_a_person_says_settles_a_call_and_stops_every_attempt(
    ledger: Ledger, left: State, happened: bool
) -> None:
    grant = await granted(ledger, book())
    if left is not State.RESERVED:
        await ledger.record(book(), grant.attempt, left, 1, None, GONE)
    assert await ledger.settle("run/1", happened, {"order": 7} if happened else None, "says ada")
    with pytest.raises(Fenced):
        await ledger.record(book(), grant.attempt, State.DONE, 0, Settled(State.DONE, "late"), None)
    settled = await ledger.reserve(book())
    assert isinstance(settled, Settled)
    assert (settled.state, settled.result) == ((State.DONE, {"order": 7}) if happened else (State.FAILED, None))


async def test_what_is_done_needs_no_person(ledger: Ledger) -> None:
    assert not await ledger.settle("run/1", True, None, "nobody called it")
    grant = await granted(ledger, book())
    await ledger.record(book(), grant.attempt, State.DONE, 0, DONE, None)
    assert not await ledger.settle("run/1", False, None, "says ada")
    assert await ledger.reserve(book()) == DONE


async def test_a_reopened_call_has_all_its_retries_and_keeps_its_doubt(ledger: Ledger) -> None:
    for state, doubtful in ((State.FAILED, False), (State.UNKNOWN, True)):
        call = book(f"run/{state}")
        grant = await granted(ledger, call)
        await ledger.record(call, grant.attempt, state, 6, Settled(state, error="gone"), GONE)
        assert await ledger.reopen(call.key)
        again = await granted(ledger, call)
        assert (again.failures, again.doubtful) == (0, doubtful)


async def test_what_is_done_is_not_reopened(ledger: Ledger) -> None:
    grant = await granted(ledger, book())
    await ledger.record(book(), grant.attempt, State.DONE, 0, DONE, None)
    assert not await ledger.reopen("run/1")
    assert not await ledger.reopen("run/never")


async def test_what_is_known_of_a_key_is_nothing_a_doubt_or_its_result(ledger: Ledger) -> None:
    assert await ledger.known("run/1") is None
    grant = await granted(ledger, book())
    open_ = await ledger.known("run/1")
    assert open_ is not None
    assert open_.state is State.UNKNOWN
    await ledger.record(book(), grant.attempt, State.DONE, 0, DONE, None)
    assert await ledger.known("run/1") == DONE


# ------------------------------------------------------------ the rows


async def test_the_rows_tell_what_happened_in_order(db: Database) -> None:
    one, two = Ledger(db, "w1"), Ledger(db, "w2")
    first, second = book(), book("run/2", slot=2)
    await granted(one, first)
    grant = await granted(two, first)
    other = await granted(one, second)
    await two.record(first, grant.attempt, State.DONE, 0, DONE, None)
    await one.record(second, other.attempt, State.UNKNOWN, 1, None, GONE)
    await granted(one, replace(book("other/1"), key_base="other"))
    a, b = await one.entries("run")
    assert (a.key, a.name, a.state, a.attempt, a.worker, a.settled) == ("run/1", "book", State.DONE, 2, "w2", DONE)
    assert (b.key, b.state, b.failures, b.settled, b.error) == ("run/2", State.UNKNOWN, 1, None, "unavailable: gone")
    assert (a.seq, a.arguments, a.effect, a.log) == (1, {}, Effect.IDEMPOTENT, [])
    assert [(line["worker"], line["error"]) for line in b.log] == [("w1", "unavailable: gone")]
    assert await one.entry("run/2") == b
    assert a.settled_at is not None
    assert a.reserved_at <= a.settled_at
