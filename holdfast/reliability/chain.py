"""The protection chain around every model and tool call. Its steps, in order:

    ledger look-up → place in flight → rate limit → circuit breaker → reserve → timeout → call → classify
    → record and settle

If the ledger has a recorded result, the chain returns it before any other step. A step that has to wait raises
`NotYet`: nothing was reserved, no attempt is counted, and the workflow waits on a durable timer. Add a further step in
`_take`, before the reservation.

Temporal does the retries: a failure that can be retried leaves as `RetryLater` with its delay, and the ledger counts
it. A crash, a deploy or a wait does not count.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from holdfast.aio import to_the_end
from holdfast.authoring.tools import NotReady
from holdfast.contracts.failures import ErrorType, Failure
from holdfast.contracts.profile import Effect
from holdfast.reliability import crash_points, heartbeat, lease
from holdfast.reliability.breaker import LONGEST_NAP_S, Breaker, Change, Pass
from holdfast.reliability.crash_points import Point
from holdfast.reliability.errors import backoff, classify
from holdfast.reliability.in_flight import CallsInFlight
from holdfast.reliability.ledger import Call, Fenced, Grant, Ledger, Settled, State
from holdfast.reliability.limits import Limiter, Ticket
from holdfast.reliability.waiting import NoAddress, NotYet, Unsettled
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database, StoreUnavailable
from holdfast.telemetry import metrics

log = logging.getLogger(__name__)

Act = Callable[[int], Awaitable[Any]]
"""Makes the call. Takes the attempt's number, returns JSON data."""

_POINTS = {
    "tool": (Point.RESERVED, Point.EFFECT_DONE, Point.RECORDED),
    "model": (Point.MODEL_RESERVED, Point.MODEL_ANSWERED, Point.MODEL_RECORDED),
    "hook": (Point.RESERVED, Point.EFFECT_DONE, Point.RECORDED),
    "undo": (Point.UNDO_RESERVED, Point.UNDO_DONE, Point.UNDO_RECORDED),
}
_STALE_S = 1.0
"""Seconds. A reservation older than this is renewed before the call goes out: this process may have been frozen."""
_LEASE_GRACE_S = 2.0
_ADVICE_S = 1.0


class StandDown(Exception):
    """Raised by an act that holds its reservation and finds that it must not act now. It did nothing."""


class RetryLater(Exception):
    """A real failure that was counted and can be retried after `delay` seconds."""

    def __init__(self, failure: Failure, delay: float) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.delay = delay


class Guards:
    """The protections of a process: ledger, rate limits, calls in flight and circuit breakers.

    worker: the name of the process in the rows that it reserves.
    """

    def __init__(self, db: Database, worker: str) -> None:
        self.clock = StoreClock(db)
        self.ledger = Ledger(db, worker, self.clock)
        self.limiter = Limiter(db, self.clock)
        self.places = CallsInFlight(db, self.clock)
        self.breaker = Breaker(db, self.clock)
        self._shut: set[str] = set()
        self._shut_at = float("-inf")

    async def shut(self) -> set[str]:
        """Returns the targets whose circuit breaker is open, at most a second old: for advice, not for decisions."""
        if time.monotonic() - self._shut_at > _ADVICE_S:
            self._shut_at = time.monotonic()
            self._shut = set(await self.breaker.open_targets())
        return self._shut

    async def close(self) -> None:
        await self.places.close()
        await self.limiter.close()


@dataclass(frozen=True)
class _Entry:
    """An admitted call, with what has to be settled when it ends."""

    guards: Guards
    call: Call
    tickets: tuple[Ticket, ...]
    passed: Pass

    async def succeeded(self, tokens: int) -> tuple[str, ...]:
        """Reports the success to the rate limits and the breaker. Returns the notes for the run."""
        for ticket in self.tickets:
            self.guards.limiter.settle(ticket, tokens)
        return _breaker_notes(await self.guards.breaker.succeeded(self.passed))

    async def failed(self, failure: Failure, *, again: bool) -> tuple[str, ...]:
        """Reports the failure to the breaker. Returns the notes for the run.

        again: the call has failed before. An unreadable response counts once per call: it says little about the
        service, which may answer other calls well.
        """
        breaker = self.guards.breaker
        if failure.type is ErrorType.RATE_LIMITED and failure.retry_after and self.passed.target:
            await breaker.pause(self.passed.target, failure.retry_after)
        if again and failure.type is ErrorType.BAD_RESPONSE:
            await breaker.released(self.passed)
            return ()
        return _breaker_notes(await breaker.failed(self.passed, failure))

    async def left(self) -> None:
        """Gives everything back: the call did not go out."""
        _give_back(self.guards, self.tickets)
        await self.guards.breaker.released(self.passed)


async def protected(
    guards: Guards, call: Call, act: Act, probe: Act | None = None, tokens: Callable[[Any], int] = lambda _: 0
) -> Settled:
    """Runs the call at most once and returns its final state.

    DONE: with the result. FAILED: it certainly did not happen, and a retry will not help. UNKNOWN: it may have
    happened, and must not be retried blindly.
    tokens: computes from a result how much of a token limit it used.
    Raises NotYet, NotReady, RetryLater, KeyConflict, and Fenced when another attempt took over.
    """
    recorded = _POINTS[call.kind][2]
    async with _place(guards, call):
        if call.effect is Effect.READ:
            settled = await _repeatable(guards, call, act, tokens)
        else:
            settled = await _once(guards, call, act, probe, tokens)
    crash_points.reached(recorded, call.name)
    return settled


@asynccontextmanager
async def _place(guards: Guards, call: Call) -> AsyncIterator[None]:
    """Holds a place among the calls in flight, if the service limits them. A settled call needs none."""
    if call.in_flight is None or await guards.ledger.settled(call):
        yield
    else:
        async with guards.places.held(call.in_flight, call.key):
            yield


# ------------------------------------------------------------------ reads and model calls: safe to repeat


async def _repeatable(guards: Guards, call: Call, act: Act, tokens: Callable[[Any], int]) -> Settled:
    """Runs a call that changes nothing outside. A model's answer is kept; all attempts get the first one kept."""
    reserved, answered, _ = _POINTS[call.kind]
    look = await guards.ledger.look(call, await guards.clock.now())
    if look.settled:
        return look.settled
    since = time.monotonic()
    entry = await _admit(guards, call, await _take(guards, call), look.shut, look.breaker_failures)
    crash_points.reached(reserved, call.name)
    try:
        _check_lease(call)
        if time.monotonic() - since > _STALE_S:
            await guards.breaker.check(entry.passed)
        async with _limit(call):
            result = await act(1)
    except NotReady as later:
        _check_lease(call)
        await entry.succeeded(0)  # the service answered
        if look.failures:
            await guards.ledger.forget_failures(call)
        _save_position(call, later)
        raise
    except (RetryLater, NotYet, Fenced, StoreUnavailable):
        await entry.left()  # a nested call failed and was counted there, or another attempt took over
        raise
    except asyncio.CancelledError:
        await to_the_end(entry.left())  # the run has ended or this worker stops, which says nothing of the service
        raise
    except Exception as error:
        _check_lease(call)  # if this process was frozen, its timeout says nothing about the service
        failure = _classified(call, error)
        notes = await entry.failed(failure, again=look.failures > 0)
        failures = await guards.ledger.count_failure(call, failure)
        if failure.retry and failures <= call.retries:
            raise RetryLater(failure, _delay(call, failures, failure)) from error
        if call.kind == "model":
            await guards.ledger.forget_failures(call)
        return Settled(State.FAILED, None, failure.message, failure.type, failures, notes)
    crash_points.reached(answered, call.name)
    _check_lease(call)
    notes = await entry.succeeded(tokens(result))
    if call.kind == "model":
        return await guards.ledger.keep(call, result)
    if look.failures:
        await guards.ledger.recovered(call)
    return Settled(State.DONE, result, failures=look.failures, notes=notes)


def _check_lease(call: Call) -> None:
    """Raises Fenced when this process was frozen so long that the server has started another attempt."""
    if lease.lost():
        raise Fenced(f"another attempt has taken over {call.key}")


# ------------------------------------------------------------------ effects: reserved, done once, recorded


async def _once(guards: Guards, call: Call, act: Act, probe: Act | None, tokens: Callable[[Any], int]) -> Settled:
    reserved, answered, _ = _POINTS[call.kind]
    ledger = guards.ledger
    # Read before the reservation: a process that is frozen during the statement must not take an old one for new.
    since = time.monotonic()
    # Without a limit, the reservation does the look-up. With one, a settled call must not use up what others wait for.
    if call.limits and (known := await ledger.settled(call)):
        await guards.breaker.abandoned(call.target, call.key)
        return known
    tickets = await _take(guards, call)
    _check_lease(call)
    held = await ledger.reserve(call, admitted=not call.target)
    entry = await _admit(guards, call, tickets, held is None, held.breaker_failures if isinstance(held, Grant) else 0)
    if held is None:
        since = time.monotonic()
        _check_lease(call)
        held = await ledger.reserve(call)
        assert held is not None, "the breaker was asked"
    if isinstance(held, Settled):
        await entry.left()
        await guards.breaker.abandoned(call.target, call.key)
        return held
    crash_points.reached(reserved, call.name)
    return await _act(entry, held, since, act, probe, tokens, answered)


async def _act(
    entry: _Entry,
    grant: Grant,
    since: float,
    act: Act,
    probe: Act | None,
    tokens: Callable[[Any], int],
    answered: Point,
) -> Settled:
    """Makes the call under the reservation. since: the monotonic time at which the reservation was requested."""
    call, ledger = entry.call, entry.guards.ledger
    doubtful = grant.doubtful
    heartbeat.resume(call.key, grant.position)
    if doubtful and call.effect is Effect.MANUAL:
        await entry.left()
        message = "an earlier attempt was cut off; whether it happened is not known"
        failure = Failure(ErrorType.UNKNOWN_OUTCOME, message, retry=False, maybe_done=True)
        return await _give_up(ledger, call, grant, State.UNKNOWN, grant.failures, failure)
    if doubtful and call.effect is Effect.PROBE:
        assert probe is not None
        if known := await _ask(entry, grant, probe, tokens):
            return known
        doubtful = False  # the service has answered: it did not happen, and no longer can
    elif doubtful and call.kind == "undo" and (wait := unsettled(call, grant.ended, await entry.guards.clock.now())):
        # The undo looks before it acts, and would not see the effect of its first request that is still under way.
        await ledger.record(call, grant.attempt, State.UNKNOWN, grant.failures, None, None, grant.ended)
        await entry.left()
        raise wait
    try:
        while time.monotonic() - since > _STALE_S:
            since = time.monotonic()
            await ledger.renew(call, grant.attempt)
            await entry.guards.breaker.check(entry.passed)
        async with _limit(call):
            result = await act(grant.attempt)
    except Fenced:
        raise
    except NotReady as later:
        return await _not_ready(entry, grant, later)
    except StandDown:
        state, ended = (State.UNKNOWN, grant.ended) if doubtful else (State.FAILED, None)
        await ledger.record(call, grant.attempt, state, grant.failures, None, None, ended)
        await entry.left()
        raise
    except (RetryLater, NotYet, StoreUnavailable) as error:
        # A nested model call got no answer, or the store is unavailable. Only the tool knows whether this call had
        # acted by then. A `manual` tool declares that it had not (`ToolContext.ask_model`); the other classes can be
        # recorded as unknown. Without an address nothing was sent, so only an earlier doubt remains.
        none_sent = isinstance(error, NoAddress) and not doubtful and grant.position is None
        state = State.FAILED if none_sent or call.effect is Effect.MANUAL else State.UNKNOWN
        await ledger.record(call, grant.attempt, state, grant.failures, None, None)
        await entry.left()
        raise
    except Exception as error:  # noqa: BLE001 - every failure of an agent's code is classified, none is swallowed
        return await _failed(entry, grant, doubtful, _classified(call, error), error)
    crash_points.reached(answered, call.name)
    return await _done(entry, grant, result, tokens)


async def _ask(entry: _Entry, grant: Grant, probe: Act, tokens: Callable[[Any], int]) -> Settled | None:
    """Asks the service whether an earlier attempt's request had its effect. None: it had none, and no longer can.

    A service that is still processing the request also answers no. So its no counts only when the request is older than
    `settles_within`. Until then the call raises NotYet and asks again later; a tool without `settles_within` settles as
    UNKNOWN, and a person says how the call ended.
    """
    call, guards = entry.call, entry.guards
    asked = await guards.clock.now()
    try:
        async with _limit(call):
            found = await probe(grant.attempt)
    except Fenced:
        raise
    except NotReady as later:
        return await _not_ready(entry, grant, later)
    except (RetryLater, NotYet, StoreUnavailable):
        await guards.ledger.record(call, grant.attempt, State.UNKNOWN, grant.failures, None, None, grant.ended)
        await entry.left()
        raise
    except Exception as error:  # noqa: BLE001 - every failure of an agent's code is classified, none is swallowed
        return await _failed(entry, grant, True, _classified(call, error), error, grant.ended)
    crash_points.reached(Point.PROBED, call.name)
    if found is not None:
        return await _done(entry, grant, found, tokens)
    if call.settles_s is None:
        failure = Failure(ErrorType.UNKNOWN_OUTCOME, no_bound(call), retry=False, maybe_done=True)
        settled = await _give_up(guards.ledger, call, grant, State.UNKNOWN, grant.failures, failure, grant.ended)
        return replace(settled, notes=await entry.succeeded(0))
    if not (wait := unsettled(call, grant.ended, asked)):
        return None
    await guards.ledger.record(call, grant.attempt, State.UNKNOWN, grant.failures, None, None, grant.ended)
    await entry.succeeded(0)  # the service answered
    raise wait


def no_bound(call: Call) -> str:
    """Returns why the service's no does not settle the call."""
    return (
        f"{call.service or call.name} says that {call.name} did not happen, but it may still be processing the request:"
        " the tool declares no settles_within"
    )


def unsettled(call: Call, ended: float, now: float) -> Unsettled | None:
    """Returns the wait before the next question, while an earlier request may still have its effect.

    None when it no longer can, and when the tool declares no `settles_within`.
    """
    if call.settles_s is None or now >= (until := ended + call.settles_s):
        return None
    # After the request, ask at growing intervals: a slow service is usually done soon. While an earlier attempt may
    # still send its request, ask seldom.
    pause = max(now - ended, call.timeout_s / 5, 1.0)
    at = datetime.fromtimestamp(until, UTC)
    service = call.service or "its service"
    why = f"{call.name}: {service} may still be processing the request, until {at:%H:%M:%S} UTC at the latest"
    return Unsettled(min(until - now, pause), why)


def _classified(call: Call, error: Exception) -> Failure:
    failure = classify(error)
    if failure.type is ErrorType.INTERNAL:
        # Only the frames: the text of an exception may hold private data.
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("bug in %s (key %s): %s\n%s", call.name, call.key, type(error).__name__, frames)
    return failure


async def _done(entry: _Entry, grant: Grant, result: Any, tokens: Callable[[Any], int]) -> Settled:
    settled = Settled(State.DONE, result, failures=grant.failures)
    await entry.guards.ledger.record(entry.call, grant.attempt, State.DONE, grant.failures, settled, None)
    return replace(settled, notes=await entry.succeeded(tokens(result)))


async def _not_ready(entry: _Entry, grant: Grant, later: NotReady) -> Settled:
    """Keeps the position for the next attempt, and raises NotReady again."""
    call = entry.call
    position = _save_position(call, later)
    if position is None and call.effect is Effect.MANUAL:
        # The next attempt could not tell whether to ask for the result or to act a second time.
        why = f"{call.name} raised NotReady without a position: a tool of class manual has to give one"
        return await _failed(entry, grant, True, Failure(ErrorType.INTERNAL, why, maybe_done=True), later)
    await entry.guards.ledger.not_ready(call, grant.attempt, later.why, position)
    await entry.succeeded(0)  # the service answered
    raise later


def _save_position(call: Call, later: NotReady) -> Any:
    if later.position is not None:
        heartbeat.advance(call.key, later.position)
        return later.position
    return heartbeat.position(call.key)


async def _failed(
    entry: _Entry, grant: Grant, doubtful: bool, failure: Failure, error: Exception, ended: float | None = None
) -> Settled:
    """Counts the failure, then raises RetryLater or settles the call. ended: see `Ledger.record`."""
    call, ledger = entry.call, entry.guards.ledger
    # With a position the effect is done, and only the tool itself (ToolFailed) can say that it failed after all.
    begun = grant.position is not None
    doubtful = doubtful or failure.maybe_done or (begun and failure.type is not ErrorType.TOOL_FAILED)
    doubtful = doubtful and not call.pure
    state = State.UNKNOWN if doubtful else State.FAILED
    failures = grant.failures + 1
    blind = doubtful and call.effect is Effect.MANUAL and not begun
    # After an ambiguous failure a `probe` tool can always ask the service, even if the error itself is final.
    again = (failure.retry or (doubtful and call.effect is Effect.PROBE)) and not blind
    if again and failures <= call.retries:
        await ledger.record(call, grant.attempt, state, failures, None, failure, ended)
        await entry.failed(failure, again=grant.failures > 0)
        raise RetryLater(failure, _delay(call, failures, failure)) from error
    settled = await _give_up(ledger, call, grant, state, failures, failure, ended)
    return replace(settled, notes=await entry.failed(failure, again=grant.failures > 0))


async def _give_up(
    ledger: Ledger,
    call: Call,
    grant: Grant,
    state: State,
    failures: int,
    failure: Failure,
    ended: float | None = None,
) -> Settled:
    settled = Settled(state, None, failure.message, failure.type, failures)
    await ledger.record(call, grant.attempt, state, failures, settled, failure, ended)
    return settled


# ------------------------------------------------------------------ steps


async def _take(guards: Guards, call: Call) -> tuple[Ticket, ...]:
    """Takes tickets from the rate limits for a call that goes out now. Raises NotYet."""
    if not call.limits:
        return ()
    tickets = await guards.limiter.take_all(call.limits, call.key, call.tokens)
    crash_points.reached(Point.LIMITED, call.name)
    return tickets


async def _admit(guards: Guards, call: Call, tickets: tuple[Ticket, ...], shut: bool, breaker_failures: int) -> _Entry:
    """Admits the call through the circuit breaker: it is closed, or this call is the probe. Raises NotYet."""
    passed = Pass(call.target, call.rule, failures=breaker_failures)
    if shut:
        try:
            passed = await guards.breaker.admit(call.target, call.rule, call.key, 2 * call.timeout_s + _LEASE_GRACE_S)
        except NotYet:
            _give_back(guards, tickets)
            raise
        if passed.version:
            crash_points.reached(Point.PROBING, call.target)
    return _Entry(guards, call, tickets, passed)


def _give_back(guards: Guards, tickets: tuple[Ticket, ...]) -> None:
    for ticket in tickets:
        guards.limiter.release(ticket)


def _breaker_notes(change: Change | None) -> tuple[str, ...]:
    """Counts a breaker's change of state in the metrics. Returns the notes for the run."""
    if change is None:
        return ()
    metrics.breaker_changed(change.target, change.kind)
    return (change.words,)


class NoAnswer(Exception):
    """The call's timeout passed without an answer."""

    def __init__(self, call: Call) -> None:
        message = f"no answer from {call.service or call.name} within {call.timeout_s:g} s"
        super().__init__(message)
        self.failure = Failure(ErrorType.TIMEOUT, message, retry=True, maybe_done=True)


@asynccontextmanager
async def _limit(call: Call) -> AsyncIterator[None]:
    """Bounds the block to the call's timeout. Raises NoAnswer."""
    timer = asyncio.timeout(call.timeout_s)
    try:
        async with timer:
            yield
    except TimeoutError as error:
        if not timer.expired():
            raise  # the tool's own, shorter limit
        raise NoAnswer(call) from error


def _delay(call: Call, failures: int, failure: Failure) -> float:
    asked = failure.retry_after
    if asked and failure.type is ErrorType.RATE_LIMITED and call.target:
        # The breaker's pause holds the call back. A person can end the pause and wake the run; a retry delay stays.
        asked = min(asked, LONGEST_NAP_S)
    return backoff(failures, asked, random.random(), call.longest_delay_s)
