"""The chain with breaker and limits: who is asked when, what a call that has to wait leaves behind, and who probes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from holdfast.authoring.services import BreakerRule, Limit
from holdfast.contracts.profile import Effect
from holdfast.reliability import chain, limits
from holdfast.reliability.breaker import LONG_PAUSE_S, Row
from holdfast.reliability.chain import Guards, RetryLater, protected
from holdfast.reliability.ledger import Call, Fenced, Settled, State, tool_call
from holdfast.reliability.waiting import NotYet
from holdfast.state.database import Database
from tests.fixtures.clock import Ahead
from tests.fixtures.wire import answer, wire

T = "pharmacy"
RULE = BreakerRule()
ONE_A_MINUTE = Limit(T, requests=1)
KINDS = [*Effect, "model"]
"""Of call: a tool of each effect class, and a model call."""


@dataclass
class TwoProcesses:
    """Two processes on one store, one clock for both."""

    guards: Guards
    other: Guards
    clock: Ahead
    db: Database

    async def breaker(self) -> Row | None:
        return next((row for row in await self.guards.breaker.rows() if row.target == T), None)

    async def state(self) -> str:
        row = await self.breaker()
        return row.state if row else "closed"

    async def let_out(self) -> int:
        """Calls that the rate limit counts."""
        for each in (self.guards, self.other):
            await each.limiter.close()
        return sum(row.requests for row in await limits.usage(self.db, await self.clock.now()))

    async def rows(self) -> dict[str, tuple[State, int]]:
        return {e.key: (e.state, e.failures) for e in await self.guards.ledger.entries("run")}

    async def opens(self) -> None:
        for n in range(3):
            with pytest.raises(RetryLater):
                await protected(self.other, call(f"other/{n}", key_base="other"), fails)
        assert await self.state() == "open"

    def probe_is_due(self) -> None:
        self.clock.seconds += RULE.probe_after_s + 0.1


@pytest.fixture
async def two(db: Database) -> AsyncIterator[TwoProcesses]:
    both = Guards(db, "w1"), Guards(db, "w2")
    yield TwoProcesses(*both, Ahead(db, *both), db)
    for each in both:
        await each.close()


def call(key: str = "run/1", kind: Effect | str = Effect.IDEMPOTENT, **more: Any) -> Call:
    declared: dict[str, Any] = {"key_base": "run", "service": T, "target": T, "rule": RULE, **more}
    if kind == "model":
        return Call(key, declared.pop("key_base"), "model", "turn-1", Effect.READ, None, "asked", **declared)
    return tool_call(key, declared.pop("key_base"), "order", Effect(kind), {"n": 1}, **declared)


async def works(attempt: int) -> str:
    return "ordered"


async def fails(attempt: int) -> str:
    raise ConnectionRefusedError("nobody there")


async def never(attempt: int) -> str:
    raise AssertionError("this call must not go out")


async def finds_nothing(attempt: int) -> None:
    return None


async def run(guards: Guards, call: Call, act: Callable[[int], Awaitable[Any]] = works) -> Settled:
    return await protected(guards, call, act, finds_nothing)


async def waits(guards: Guards, call: Call) -> NotYet:
    with pytest.raises(NotYet) as caught:
        await run(guards, call, never)
    return caught.value


# ------------------------------------------------------------ order


@pytest.mark.parametrize("kind", [*(e for e in Effect if e is not Effect.READ), "model"])
async def test_a_recorded_result_is_returned_before_limit_and_breaker_are_asked(
    two: TwoProcesses, kind: Effect | str
) -> None:
    of = call(kind=kind, limits=(ONE_A_MINUTE,))
    first = await run(two.guards, of)
    await two.guards.breaker.trip(T, "for the test", "ada")
    before = await two.breaker()
    assert await run(two.guards, of, never) == first
    assert await two.breaker() == before
    assert await two.let_out() == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_an_open_breaker_lets_no_call_out_and_the_call_leaves_nothing(
    two: TwoProcesses, kind: Effect | str
) -> None:
    await two.opens()
    before = await two.breaker()
    wait = await waits(two.guards, call(kind=kind))
    assert (wait.service, 0 < wait.delay <= RULE.probe_after_s + 1) == (T, True)
    assert (await two.rows(), await two.breaker()) == ({}, before)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_that_the_breaker_holds_back_uses_up_no_rate_limit(two: TwoProcesses, kind: Effect | str) -> None:
    await two.opens()
    for n in range(3):
        assert (await waits(two.guards, call(f"run/{n}", kind, limits=(Limit(T, requests=2),)))).service == T
    assert await two.let_out() == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_a_rate_limit_that_says_wait_reserves_nothing(two: TwoProcesses, kind: Effect | str) -> None:
    await run(two.other, call("other/1", key_base="other", limits=(ONE_A_MINUTE,)))
    wait = await waits(two.guards, call(kind=kind, limits=(ONE_A_MINUTE,)))
    assert wait.service == "", "the service is well: nobody else should stand in"
    assert wait.delay > 50
    assert await two.rows() == {}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_that_a_rate_limit_holds_back_does_not_become_the_probe(
    two: TwoProcesses, kind: Effect | str
) -> None:
    await two.opens()
    two.probe_is_due()
    await run(two.other, call("other/x", key_base="other", target="", limits=(ONE_A_MINUTE,)))
    before = await two.breaker()
    assert (await waits(two.guards, call(kind=kind, limits=(ONE_A_MINUTE,)))).service == ""
    assert await two.breaker() == before


async def test_a_wait_uses_up_no_retry(two: TwoProcesses) -> None:
    await two.opens()
    for _ in range(10):
        await waits(two.guards, call(retries=0))
    two.probe_is_due()
    settled = await run(two.guards, call(retries=0))
    assert (settled.state, settled.failures) == (State.DONE, 0)
    (note,) = settled.notes
    assert re.fullmatch(rf"{T} answers again, after 3\d s: its breaker is closed", note)  # 30 s, and the waits above


# ------------------------------------------------------------ opening and closing


@pytest.mark.parametrize("kind", KINDS)
async def test_three_failures_of_any_of_several_callers_open_it_for_all(two: TwoProcesses, kind: Effect | str) -> None:
    callers = [
        (two.guards, call("run/1", kind)),
        (two.other, call("run/2", "model")),
        (two.guards, call("run/3", Effect.READ)),
    ]
    for guards, of in callers:
        assert await two.state() == "closed"
        with pytest.raises(RetryLater):
            await run(guards, of, fails)
    assert await two.state() == "open"
    for guards in (two.guards, two.other):
        assert (await waits(guards, call("run/4", kind))).service == T


async def test_a_success_of_another_caller_begins_the_count_anew(two: TwoProcesses) -> None:
    for n in range(2):
        with pytest.raises(RetryLater):
            await run(two.guards, call(f"run/{n}"), fails)
    await run(two.other, call("run/2"))
    for n in range(2):
        with pytest.raises(RetryLater):
            await run(two.guards, call(f"run/{n}"), fails)
    assert await two.state() == "closed"


async def test_a_failure_of_the_callers_own_opens_nothing(two: TwoProcesses) -> None:
    async with wire(answer(400)) as service, httpx2.AsyncClient() as http:

        async def refused(attempt: int) -> None:
            (await http.post(service.url)).raise_for_status()

        for n in range(5):
            assert (await run(two.guards, call(f"run/{n}"), refused)).state is State.FAILED
        assert len(service.requests) == 5
    assert await two.state() == "closed"


@pytest.mark.parametrize("kind", KINDS)
async def test_one_probe_goes_out_while_all_others_wait_and_its_success_closes_it(
    two: TwoProcesses, kind: Effect | str
) -> None:
    await two.opens()
    two.probe_is_due()
    out, go = asyncio.Event(), asyncio.Event()

    async def slow(attempt: int) -> str:
        out.set()
        await go.wait()
        return "ordered"

    probing = asyncio.create_task(run(two.guards, call("run/1", kind), slow))
    await out.wait()
    assert await two.state() == "half-open"
    for n, each in enumerate(KINDS, 2):
        assert "another call is probing it" in (await waits(two.other, call(f"run/{n}", each))).why
    go.set()
    assert (await probing).state is State.DONE
    assert await two.state() == "closed"
    assert (await run(two.other, call("run/9", kind))).state is State.DONE


@pytest.mark.parametrize("kind", KINDS)
async def test_a_probe_that_fails_opens_it_again_and_counts_as_a_failure_of_the_call(
    two: TwoProcesses, kind: Effect | str
) -> None:
    await two.opens()
    two.probe_is_due()
    with pytest.raises(RetryLater):
        await run(two.guards, call(kind=kind), fails)
    assert await two.state() == "open"
    assert await two.rows() == {"run/1": (State.FAILED, 1)}
    assert (await waits(two.other, call("run/2", kind))).delay > RULE.probe_after_s - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seconds", [7, 2 * LONG_PAUSE_S])
async def test_after_a_429_with_retry_after_all_others_wait_and_nothing_trips(
    two: TwoProcesses, kind: Effect | str, seconds: float
) -> None:
    """A long pause is as good as an outage: other work may go on meanwhile, so the wait names the service."""
    async with wire(answer(429, retry_after=f"{seconds:g}")) as service, httpx2.AsyncClient() as http:

        async def limited(attempt: int) -> None:
            (await http.post(service.url)).raise_for_status()

        with pytest.raises(RetryLater) as later:
            await run(two.guards, call(kind=kind), limited)
    assert later.value.delay == seconds
    wait = await waits(two.other, call("run/2", kind))
    assert seconds - 1 < wait.delay <= seconds + 1
    assert wait.service == (T if seconds > LONG_PAUSE_S else "")
    row = await two.breaker()
    assert row is not None
    assert (row.state, row.failures) == ("closed", 0)
    assert "run/2" not in await two.rows()
    two.clock.seconds += seconds
    assert (await run(two.other, call("run/2", kind))).state is State.DONE


# ------------------------------------------------------------ a prober that was frozen


def freezes(monkeypatch: pytest.MonkeyPatch, of: Any, name: str, meanwhile: Callable[[], Awaitable[Any]]) -> None:
    """The process stands still after the next call of this method with an answer; the world goes on meanwhile."""
    monkeypatch.setattr(chain, "_STALE_S", 0.02)
    whole = getattr(of, name)

    async def then_freeze(*arguments: Any, **more: Any) -> Any:
        answer = await whole(*arguments, **more)
        if answer is not None:
            monkeypatch.setattr(of, name, whole)
            await asyncio.sleep(0.05)
            await meanwhile()
        return answer

    monkeypatch.setattr(of, name, then_freeze)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_prober_that_was_frozen_until_another_call_took_the_probe_does_not_act(
    two: TwoProcesses, monkeypatch: pytest.MonkeyPatch, kind: Effect | str
) -> None:
    await two.opens()
    two.probe_is_due()

    async def another_probes() -> None:
        two.probe_is_due()  # by then the lease of the frozen one is over
        with pytest.raises(RetryLater):
            await run(two.other, call("run/2"), fails)

    reads = kind in (Effect.READ, "model")
    frozen_in = (two.guards.breaker, "admit") if reads else (two.guards.ledger, "reserve")
    freezes(monkeypatch, *frozen_in, another_probes)
    with pytest.raises(Fenced):
        await run(two.guards, call("run/1", kind), never)
    row = await two.breaker()
    assert row is not None
    assert row.state == "open"
    assert row.failures == 4, "three that opened it, and the probe of the other"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [works, fails])
async def test_what_a_frozen_prober_hears_late_does_not_touch_the_probe_of_another(
    two: TwoProcesses, kind: Effect | str, ends: Callable[[int], Awaitable[Any]]
) -> None:
    await two.opens()
    two.probe_is_due()
    out, go = asyncio.Event(), asyncio.Event()
    probes: list[asyncio.Task[Settled]] = []

    async def slow(attempt: int) -> str:
        out.set()
        await go.wait()
        return "ordered"

    async def late(attempt: int) -> Any:
        two.probe_is_due()  # by then the lease of this one is over
        probes.append(asyncio.create_task(run(two.other, call("run/2"), slow)))
        await out.wait()
        return await ends(attempt)

    if ends is works:
        assert (await run(two.guards, call("run/1", kind), late)).notes == ()
    else:
        with pytest.raises(RetryLater):
            await run(two.guards, call("run/1", kind), late)
    row = await two.breaker()
    assert row is not None
    assert (row.state, row.prober) == ("half-open", "run/2")
    go.set()
    await probes[0]
    assert await two.state() == "closed"


@pytest.mark.parametrize("kind", [Effect.IDEMPOTENT, Effect.PROBE])
async def test_an_attempt_that_was_overtaken_tells_the_breaker_nothing(two: TwoProcesses, kind: Effect) -> None:
    """The second attempt of the same call takes its own probe over at once, and closes the breaker."""
    await two.opens()
    two.probe_is_due()

    async def overtaken(attempt: int) -> Any:
        assert (await protected(two.other, call(kind=kind), works, works)).state is State.DONE
        return await fails(attempt)

    with pytest.raises(Fenced):
        await run(two.guards, call(kind=kind), overtaken)
    row = await two.breaker()
    assert row is not None
    assert (row.state, row.failures) == ("closed", 0)
    assert await two.rows() == {"run/1": (State.DONE, 0)}


# ------------------------------------------------------------ a call inside a call

LEFT = {
    Effect.READ: {},
    Effect.IDEMPOTENT: {"run/1": (State.UNKNOWN, 0)},
    Effect.PROBE: {"run/1": (State.UNKNOWN, 0)},
    Effect.MANUAL: {"run/1": (State.FAILED, 0)},
}
"""What a tool that had to wait for a model leaves. Whether it had acted by then only a `manual` one is asked."""


@pytest.mark.parametrize("kind", Effect)
async def test_a_model_call_inside_that_has_to_wait_gives_the_probe_back(two: TwoProcesses, kind: Effect) -> None:
    await two.opens()
    await two.guards.breaker.trip("a model", "for the test", "ada")
    two.probe_is_due()
    inner = call("run/1/summary", "model", target="a model")

    async def asks(attempt: int) -> Any:
        assert await two.state() == "half-open"
        return (await run(two.guards, inner, never)).result

    with pytest.raises(NotYet) as caught:
        await run(two.guards, call("run/1", kind), asks)
    assert caught.value.service == "a model"
    assert await two.state() == "open"
    assert await two.rows() == LEFT[kind]
    assert (await run(two.other, call("run/2", kind))).state is State.DONE, "the next one may probe at once"


@pytest.mark.parametrize("kind", Effect)
async def test_a_model_call_inside_that_fails_gives_the_probe_back_and_trips_only_its_own(
    two: TwoProcesses, kind: Effect
) -> None:
    await two.opens()
    two.probe_is_due()
    inner = call("run/1/summary", "model", target="a model")

    async def asks(attempt: int) -> Any:
        return (await run(two.guards, inner, fails)).result

    with pytest.raises(RetryLater):
        await run(two.guards, call("run/1", kind), asks)
    rows = {row.target: (row.state, row.failures) for row in await two.guards.breaker.rows()}
    assert rows == {T: ("open", 3), "a model": ("closed", 1)}
    assert await two.rows() == {**LEFT[kind], "run/1/summary": (State.FAILED, 1)}
