"""What the kill sweep has found, each as the smallest case that shows it."""

from __future__ import annotations

import time

import pytest

from holdfast.authoring.services import BreakerRule, Limit
from holdfast.contracts.failures import ErrorType, Failure
from holdfast.contracts.profile import Effect
from holdfast.reliability import chain, crash_points, lease
from holdfast.reliability.breaker import Pass
from holdfast.reliability.chain import Guards, protected
from holdfast.reliability.crash_points import Point
from holdfast.reliability.ledger import Call, Fenced, Grant, Ledger, Settled, State, tool_call
from holdfast.state.database import Database


class FrozenInReserve(Ledger):
    """A worker that is stopped after its reservation was made and before it hears of it; another one takes over."""

    def __init__(self, db: Database, other: Ledger, seconds: float) -> None:
        super().__init__(db, "frozen")
        self._other, self._seconds = other, seconds

    async def reserve(self, call: Call, *, admitted: bool = True) -> Grant | Settled | None:
        held = await super().reserve(call, admitted=admitted)
        await self._other.reserve(call)
        time.sleep(self._seconds)  # noqa: ASYNC251 - the whole process stands still
        return held


@pytest.mark.parametrize("effect", [Effect.IDEMPOTENT, Effect.PROBE, Effect.MANUAL])
async def test_frozen_between_reservation_and_its_answer_does_not_act(
    db: Database, monkeypatch: pytest.MonkeyPatch, effect: Effect
) -> None:
    monkeypatch.setattr(chain, "_STALE_S", 0.05)
    acted: list[int] = []

    async def act(attempt: int) -> str:
        acted.append(attempt)
        return "done"

    other = Ledger(db, "other")
    guards = Guards(db, "frozen")
    guards.ledger = FrozenInReserve(db, other, 0.1)
    call = tool_call("k/1", "k", "send", effect, {"to": "ada"})
    with pytest.raises(Fenced):
        await protected(guards, call, act, act)
    assert acted == []
    (entry,) = await other.entries("k")
    assert (entry.state, entry.attempt, entry.worker) == (State.RESERVED, 2, "other")


@pytest.mark.parametrize("point", [Point.LIMITED, Point.PROBING])
async def test_frozen_before_its_reservation_leaves_the_attempt_alone_that_took_over(
    db: Database, monkeypatch: pytest.MonkeyPatch, point: Point
) -> None:
    """That one's request may be on its way: asked about now, it would seem not to have happened, and be sent again."""
    rule = BreakerRule(failures=1, probe_after_s=1e-9)
    call = tool_call("k/1", "k", "mail", Effect.PROBE, {}, target="mail", rule=rule, limits=(Limit("mail", 60),))
    guards, other, now = Guards(db, "frozen"), Ledger(db, "other"), [0.0]
    if point is Point.PROBING:
        await guards.breaker.failed(Pass("mail", rule), Failure(ErrorType.UNAVAILABLE, "503"))
    lease.current.set(lease.Lease(3.0, clock=lambda: now[0]))
    monkeypatch.setattr(crash_points, "strike", lambda pid, number: now.append(now.pop() + 20))
    monkeypatch.setattr(crash_points, "_armed", ("freeze", point, "mail"))
    asked: list[int] = []

    async def ask(attempt: int) -> None:
        asked.append(attempt)

    await other.reserve(call)
    with pytest.raises(Fenced):
        await protected(guards, call, ask, ask)
    assert (asked, now) == ([], [20.0])
    (entry,) = await other.entries("k")
    assert (entry.state, entry.attempt, entry.worker) == (State.RESERVED, 1, "other")


@pytest.mark.parametrize("limits", [(), (Limit("mail", 60),)], ids=["free", "limited"])
async def test_probe_of_a_worker_that_died_after_recording_its_result_is_given_back(
    db: Database, monkeypatch: pytest.MonkeyPatch, limits: tuple[Limit, ...]
) -> None:
    rule = BreakerRule(failures=1, probe_after_s=1e-9)
    call = tool_call("k/1", "k", "mail", Effect.MANUAL, {}, target="mail", rule=rule, limits=limits)
    dying, other = Guards(db, "dying"), Guards(db, "other")
    await dying.breaker.failed(Pass("mail", rule), Failure(ErrorType.UNAVAILABLE, "503"))

    class Died(BaseException):
        pass

    async def die(passed: Pass) -> None:
        raise Died

    async def act(attempt: int) -> str:
        return "sent"

    monkeypatch.setattr(dying.breaker, "succeeded", die)
    with pytest.raises(Died):
        await protected(dying, call, act)
    assert (await protected(other, call, act)).result == "sent"
    probe = await other.breaker.admit("mail", rule, "k/2", 10.0)
    assert probe.version, "and not only when the lease of the dead one is over"


async def test_frozen_read_counts_no_failure_on_waking(db: Database) -> None:
    now = [0.0]
    lease.current.set(lease.Lease(3.0, clock=lambda: now[0]))
    guards = Guards(db, "frozen")
    call = tool_call("k/1", "k", "read_record", Effect.READ, {"patient_id": "pat-1"})

    async def act(attempt: int) -> str:
        now[0] += 20
        raise TimeoutError

    with pytest.raises(Fenced):
        await protected(guards, call, act)
    assert await guards.ledger.entries("k") == []


async def test_read_whose_inner_call_was_taken_over_counts_no_failure(db: Database) -> None:
    guards = Guards(db, "frozen")

    async def act(attempt: int) -> str:
        raise Fenced("another attempt has taken over k/1/summary")

    with pytest.raises(Fenced):
        await protected(guards, tool_call("k/1", "k", "write_summary", Effect.READ, {}), act)
    assert await guards.ledger.entries("k") == []


@pytest.mark.parametrize("left", [None, State.FAILED, State.UNKNOWN])
async def test_after_its_undo_began_no_attempt_of_a_call_acts(db: Database, left: State | None) -> None:
    ledger = Ledger(db, "w")
    call = tool_call("k/1", "k", "send", Effect.IDEMPOTENT, {"to": "ada"})
    held = await ledger.reserve(call)
    assert isinstance(held, Grant)
    if left:  # it failed, or perhaps did, and was to be tried again
        await ledger.record(call, held.attempt, left, 1, None, None)
    await ledger.seize(call, "the run was undone")
    closed = await ledger.entries("k")
    assert isinstance(await ledger.reserve(call), Settled)
    await ledger.seize(call, "the run was undone")  # by a worker that was frozen when the undo began
    assert await ledger.entries("k") == closed


@pytest.mark.parametrize("happened", [True, False])
async def test_a_finding_that_a_frozen_worker_brings_again_changes_nothing(db: Database, happened: bool) -> None:
    ledger = Ledger(db, "w")
    await ledger.reserve(tool_call("k/1", "k", "send", Effect.MANUAL, {"to": "ada"}))
    assert await ledger.settle("k/1", happened, "sent", "says ada")
    before = await ledger.entries("k")
    assert not await ledger.settle("k/1", happened, "sent", "says ada")
    assert await ledger.entries("k") == before
