"""The protection chain: what each effect class makes of each failure, over real connections, on both stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import pytest

from holdfast.contracts.failures import ErrorType
from holdfast.contracts.profile import Effect
from holdfast.reliability import chain
from holdfast.reliability.chain import Guards, RetryLater, protected
from holdfast.reliability.ledger import Call, Fenced, Grant, KeyConflict, Ledger, Settled, State, tool_call
from holdfast.reliability.waiting import Unsettled
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database
from tests.fixtures.wire import Step, Then, answer, free_port, wire

NEW = Effect.IDEMPOTENT


class Clock(StoreClock):
    """The store's clock, and how much later it is by now."""

    later = 0.0

    async def now(self) -> float:
        return await super().now() + self.later


@pytest.fixture
def clock(db: Database) -> Clock:
    return Clock(db)


@pytest.fixture
async def guards(db: Database, clock: Clock) -> AsyncIterator[Guards]:
    made = Guards(db, worker="w1")
    made.clock, made.ledger = clock, Ledger(db, "w1", clock)
    yield made
    await made.close()


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=None) as client:
        yield client


def order(effect: Effect = NEW, **more: Any) -> Call:
    return tool_call("run/1", "run", "order", effect, {"n": 1}, service="pharmacy", **more)


@dataclass
class Tool:
    """Counts what is asked of it. `finds`: what its probe answers."""

    error: BaseException | None = None
    finds: Any = None
    acts: int = 0
    probes: int = 0
    attempts: list[int] = field(default_factory=list)

    async def act(self, attempt: int) -> str:
        self.acts += 1
        self.attempts.append(attempt)
        if self.error:
            raise self.error
        return "ordered"

    async def probe(self, attempt: int) -> Any:
        self.probes += 1
        return self.finds

    async def run(self, guards: Guards, call: Call) -> Settled:
        return await protected(guards, call, self.act, self.probe)


async def state(guards: Guards) -> tuple[State, int] | None:
    """State and counted failures of the one row, or None."""
    rows = await guards.ledger.entries("run")
    return (rows[0].state, rows[0].failures) if rows else None


async def test_a_result_is_recorded_once_and_answers_every_repeat(guards: Guards) -> None:
    tool = Tool()
    assert await tool.run(guards, order()) == Settled(State.DONE, "ordered")
    assert await tool.run(guards, order()) == Settled(State.DONE, "ordered")
    assert tool.acts == 1


async def test_a_read_is_repeated_and_leaves_no_row(guards: Guards) -> None:
    tool = Tool()
    for _ in range(2):
        assert await tool.run(guards, order(Effect.READ)) == Settled(State.DONE, "ordered")
    assert tool.acts == 2
    assert await state(guards) is None


# ------------------------------------------------------------ failures of the service


Expected = tuple[str, State, int, int]
"""How the first attempt ends, what the row says, how often the second one acts and probes."""


def retried(failed_as: State, acts: int = 1, probes: int = 0) -> Expected:
    return "retried", failed_as, acts, probes


GAVE_UP: Expected = ("given up", State.UNKNOWN, 0, 0)
REFUSED: Expected = ("given up", State.FAILED, 0, 0)
AMBIGUOUS: dict[Effect, Expected] = {
    Effect.READ: retried(State.FAILED),
    Effect.IDEMPOTENT: retried(State.UNKNOWN),
    Effect.PROBE: retried(State.UNKNOWN, probes=1),
    Effect.MANUAL: GAVE_UP,
}
CERTAIN: dict[Effect, Expected] = dict.fromkeys(Effect, retried(State.FAILED))
OWN_FAULT: dict[Effect, Expected] = dict.fromkeys(Effect, REFUSED)
FAILURES: dict[str, tuple[list[Step] | None, dict[Effect, Expected]]] = {
    "503": ([answer(503)], AMBIGUOUS),
    "timeout": ([Then.HANG], AMBIGUOUS),
    "reset": ([Then.RESET], AMBIGUOUS),
    "429": ([answer(429)], CERTAIN),
    "unreachable": (None, CERTAIN),
    "400": ([answer(400)], OWN_FAULT),
    "401": ([answer(401)], OWN_FAULT),
}


@pytest.mark.parametrize("effect", Effect)
@pytest.mark.parametrize("failure", FAILURES)
async def test_what_a_failure_means(
    guards: Guards, clock: Clock, http: httpx2.AsyncClient, effect: Effect, failure: str
) -> None:
    """The first attempt fails over the wire, the second meets a healthy tool whose probe finds nothing."""
    steps, expected = FAILURES[failure]
    ends, failed_as, acts, probes = expected[effect]
    call = order(effect, timeout_s=0.3 if failure == "timeout" else 60, settles_s=30.0)

    async def over_the_wire(attempt: int) -> str:
        (await http.post(url)).raise_for_status()
        return "ordered"

    async with wire(*(steps or ())) as service:
        url = service.url if steps else f"http://127.0.0.1:{free_port()}"
        if ends == "retried":
            with pytest.raises(RetryLater) as later:
                await protected(guards, call, over_the_wire, Tool().probe)
            assert 0.4 <= later.value.delay <= 0.6
        else:
            settled = await protected(guards, call, over_the_wire, Tool().probe)
            assert (settled.state, settled.result) == (failed_as, None)
    assert await state(guards) == (failed_as, 1)
    if effect is Effect.READ and ends == "given up":
        return  # nothing is settled for a read: asking again is free
    clock.later = 30
    tool = Tool()
    again = await tool.run(guards, call)
    assert (tool.acts, tool.probes) == (acts, probes)
    assert again.state is (State.DONE if ends == "retried" else failed_as)
    assert again.failures == 1


@pytest.mark.parametrize(
    ("effect", "finds", "ends"),
    [
        (Effect.READ, None, (State.DONE, "ordered", 1, 0)),
        (Effect.IDEMPOTENT, None, (State.DONE, "ordered", 1, 0)),
        (Effect.PROBE, None, (State.DONE, "ordered", 1, 1)),
        (Effect.PROBE, "found", (State.DONE, "found", 0, 1)),
        (Effect.MANUAL, None, (State.UNKNOWN, None, 0, 0)),
    ],
)
async def test_after_a_crash_between_the_effect_and_its_record(
    guards: Guards, clock: Clock, effect: Effect, finds: Any, ends: tuple[State, Any, int, int]
) -> None:
    call = order(effect, timeout_s=10, settles_s=30.0)
    crashed = Tool(error=asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await crashed.run(guards, call)
    clock.later = 42
    tool = Tool(finds=finds)
    settled = await tool.run(guards, call)
    assert (settled.state, settled.result, tool.acts, tool.probes) == ends
    assert settled.failures == 0, "a crash is no failure"
    assert await tool.run(guards, call) == settled


async def test_ten_crashes_use_up_no_retry(guards: Guards) -> None:
    for _ in range(10):
        with pytest.raises(asyncio.CancelledError):
            await Tool(error=asyncio.CancelledError()).run(guards, order(retries=1))
    with pytest.raises(RetryLater):
        await Tool(error=ConnectionResetError("gone")).run(guards, order(retries=1))
    tool = Tool()
    assert (await tool.run(guards, order(retries=1))).state is State.DONE
    assert tool.attempts == [12]


@pytest.mark.parametrize("effect", [Effect.READ, Effect.IDEMPOTENT, Effect.PROBE])
async def test_real_failures_are_counted_up_to_the_limit_with_growing_delays(guards: Guards, effect: Effect) -> None:
    tool, delays = Tool(error=ConnectionRefusedError("no")), []
    for _ in range(3):
        with pytest.raises(RetryLater) as later:
            await tool.run(guards, order(effect, retries=3))
        delays.append(later.value.delay)
    settled = await tool.run(guards, order(effect, retries=3))
    assert (settled.state, settled.failures, settled.error_type) == (State.FAILED, 4, ErrorType.UNREACHABLE)
    assert [0.8 * d <= delay <= 1.2 * d for d, delay in zip([0.5, 1, 2], delays, strict=True)] == [True] * 3


async def test_one_doubt_among_certain_failures_stays_a_doubt(guards: Guards) -> None:
    call = order(retries=1)
    with pytest.raises(RetryLater):
        await Tool(error=ConnectionResetError("in the middle")).run(guards, call)
    settled = await Tool(error=ConnectionRefusedError("down")).run(guards, call)
    assert settled.state is State.UNKNOWN, "the first try may have done it"


async def test_a_probe_that_finds_nothing_ends_the_doubt(guards: Guards, clock: Clock) -> None:
    call = order(Effect.PROBE, retries=1, settles_s=30.0)
    with pytest.raises(RetryLater):
        await Tool(error=ConnectionResetError("in the middle")).run(guards, call)
    clock.later = 30
    settled = await Tool(error=ConnectionRefusedError("down")).run(guards, call)
    assert settled.state is State.FAILED


# ------------------------------------------------------------ a service that may still be at work


@pytest.mark.parametrize("killed", [False, True], ids=["timed out", "killed"])
async def test_a_no_does_not_count_while_the_service_may_be_at_work(guards: Guards, clock: Clock, killed: bool) -> None:
    """It is asked again until then, which is no failure; an attempt that only asked does not put that off."""
    call = order(Effect.PROBE, timeout_s=10, settles_s=30.0, retries=1)
    with pytest.raises(asyncio.CancelledError if killed else RetryLater):
        await Tool(error=asyncio.CancelledError() if killed else TimeoutError("no answer")).run(guards, call)
    counted = 0 if killed else 1
    tool, asked = Tool(), 0
    for clock.later in (1, 5, 15, 29, 40) if killed else (1, 5, 15, 29):
        with pytest.raises(Unsettled) as wait:
            await tool.run(guards, call)
        asked += 1
        assert 0 < wait.value.delay <= 30
        assert "may still be processing" in wait.value.why
        assert await state(guards) == (State.UNKNOWN, counted)
    clock.later = 42 if killed else 31
    settled = await tool.run(guards, call)
    assert (settled.state, settled.failures, tool.acts, tool.probes) == (State.DONE, counted, 1, asked + 1)


async def test_a_yes_counts_at_once(guards: Guards) -> None:
    call = order(Effect.PROBE, settles_s=30.0)
    with pytest.raises(RetryLater):
        await Tool(error=TimeoutError("no answer")).run(guards, call)
    with pytest.raises(Unsettled):
        await Tool().run(guards, call)
    tool = Tool(finds="found")
    assert (await tool.run(guards, call)).result == "found"
    assert tool.acts == 0


async def test_a_probe_that_fails_does_not_put_off_when_a_no_counts(guards: Guards, clock: Clock) -> None:
    call = order(Effect.PROBE, settles_s=30.0)
    with pytest.raises(RetryLater):
        await Tool(error=TimeoutError("no answer")).run(guards, call)

    async def fails(attempt: int) -> Any:
        raise ConnectionResetError("asked in vain")

    clock.later = 29
    with pytest.raises(RetryLater):
        await protected(guards, call, Tool().act, fails)
    clock.later = 31
    assert (await Tool().run(guards, call)).state is State.DONE


async def test_an_attempt_that_was_frozen_counts_from_when_it_acts(
    guards: Guards, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody took over while it stood still, so it acts long after its reservation, and is killed then."""
    call, reserve = order(Effect.PROBE, timeout_s=10, settles_s=30.0), guards.ledger.reserve
    monkeypatch.setattr(chain, "_STALE_S", 0.05)

    async def then_sleep_long(of: Call, **asked: Any) -> Grant | Settled | None:
        held = await reserve(of, **asked)
        await asyncio.sleep(0.1)
        clock.later = 100
        return held

    monkeypatch.setattr(guards.ledger, "reserve", then_sleep_long)
    with pytest.raises(asyncio.CancelledError):
        await Tool(error=asyncio.CancelledError()).run(guards, call)
    monkeypatch.setattr(guards.ledger, "reserve", reserve)
    clock.later = 130
    with pytest.raises(Unsettled):
        await Tool().run(guards, call)


async def test_without_a_bound_a_no_is_left_to_a_person(guards: Guards, clock: Clock) -> None:
    with pytest.raises(RetryLater):
        await Tool(error=TimeoutError("no answer")).run(guards, order(Effect.PROBE))
    clock.later = 1e6
    tool = Tool()
    settled = await tool.run(guards, order(Effect.PROBE))
    assert (settled.state, tool.acts, tool.probes) == (State.UNKNOWN, 0, 1)
    assert "settles_within" in settled.error


# ------------------------------------------------------------ an attempt that was frozen


async def test_an_attempt_that_was_overtaken_while_it_acted_records_nothing(guards: Guards) -> None:
    call, other = order(), Tool()

    async def overtaken(attempt: int) -> str:
        assert (await other.run(guards, call)).result == "ordered"
        return "ordered by the one that was frozen"

    with pytest.raises(Fenced):
        await protected(guards, call, overtaken)
    assert (await other.run(guards, call)).result == "ordered"


async def test_an_attempt_that_was_frozen_before_it_acted_does_not_act(
    guards: Guards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen between reservation and call: the clock jumps, and another attempt has the key by then."""
    call, frozen, other = order(), Tool(), Tool()
    reserve = guards.ledger.reserve
    monkeypatch.setattr(chain, "_STALE_S", 0.05)

    async def then_sleep_long(of: Call, **asked: Any) -> Grant | Settled | None:
        held = await reserve(of, **asked)
        await asyncio.sleep(0.1)
        monkeypatch.setattr(guards.ledger, "reserve", reserve)
        await other.run(guards, call)
        return held

    monkeypatch.setattr(guards.ledger, "reserve", then_sleep_long)
    with pytest.raises(Fenced):
        await frozen.run(guards, call)
    assert (frozen.acts, other.acts) == (0, 1)


# ------------------------------------------------------------ model calls


def question(key: str = "run/turn-1", **more: Any) -> Call:
    """A model call: it changes nothing outside, and its answer is kept."""
    call = Call(key, "run", "model", "turn-1", Effect.READ, None, "asked", service="model")
    return replace(call, **more)


async def test_a_models_answer_is_kept_for_its_key_and_paid_once(guards: Guards) -> None:
    model = Tool()
    assert await model.run(guards, question()) == Settled(State.DONE, "ordered")
    assert await model.run(guards, question()) == Settled(State.DONE, "ordered")
    assert model.acts == 1
    with pytest.raises(KeyConflict):
        await model.run(guards, question(digest="asked otherwise"))


async def test_of_two_answers_to_one_question_the_first_one_kept_is_everybodys(guards: Guards) -> None:
    """An attempt that was given up and still waited for its model must go on like the one that took over."""
    second = Tool()

    async def slower(attempt: int) -> str:
        await second.run(guards, question())
        return "another answer"

    assert (await protected(guards, question(), slower)).result == "ordered"
    assert (await Tool().run(guards, question())).result == "ordered"


async def test_a_model_call_that_is_given_up_begins_anew_next_time(guards: Guards) -> None:
    call = question(retries=1)
    for _ in range(2):
        with pytest.raises(RetryLater):
            await Tool(error=ConnectionResetError("gone")).run(guards, call)
        settled = await Tool(error=ConnectionResetError("gone")).run(guards, call)
        assert (settled.state, settled.failures) == (State.FAILED, 2)
    assert (await Tool().run(guards, call)).state is State.DONE


async def test_a_failure_inside_is_not_counted_twice(guards: Guards) -> None:
    """A tool asks a model: the failure is counted on the model's row. Whether the tool has acted is not known."""
    inner, outer = question("run/1/summary"), order()

    async def asks(attempt: int) -> Any:
        return (await Tool(error=ConnectionResetError("gone")).run(guards, inner)).result

    with pytest.raises(RetryLater):
        await protected(guards, outer, asks)
    rows = {e.key: (e.state, e.failures) for e in await guards.ledger.entries("run")}
    assert rows == {"run/1/summary": (State.FAILED, 1), "run/1": (State.UNKNOWN, 0)}
