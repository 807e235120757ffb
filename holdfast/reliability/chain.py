"""The protection chain around every model and tool call, in one place and in this order:

    ledger look-up → place in flight → rate limit → breaker → reserve → timeout → call → classify → record and settle

A recorded result is returned before anything else is asked. A link that says "not before T" raises `NotYet`: nothing
was reserved, no attempt is counted, and the workflow waits on a durable timer. Another link goes into `_let_in`.

Retries belong to Temporal: a failure that may be tried again leaves as `RetryLater` with its delay, and the ledger
counts it. A crash, a deploy or a wait counts nothing.
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
from holdfast.contracts import Effect
from holdfast.reliability import faults, heartbeat, lease
from holdfast.reliability.breaker import LONGEST_NAP_S, Breaker, Change, Pass
from holdfast.reliability.errors import ErrorType, Failure, backoff, classify
from holdfast.reliability.faults import Point
from holdfast.reliability.ledger import Call, Fenced, Grant, Ledger, Settled, State
from holdfast.reliability.limits import Limiter, Ticket
from holdfast.reliability.places import Places
from holdfast.reliability.waiting import NoAddress, NotYet, Unsettled
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database, StoreUnavailable
from holdfast.telemetry import metrics
from holdfast.tools import NotReady

log = logging.getLogger(__name__)

Act = Callable[[int], Awaitable[Any]]
"""Does the call. Gets the attempt's number, returns JSON data."""

_POINTS = {
    "tool": (Point.RESERVED, Point.EFFECT_DONE, Point.RECORDED),
    "model": (Point.MODEL_RESERVED, Point.MODEL_ANSWERED, Point.MODEL_RECORDED),
    "hook": (Point.RESERVED, Point.EFFECT_DONE, Point.RECORDED),
    "undo": (Point.UNDO_RESERVED, Point.UNDO_DONE, Point.UNDO_RECORDED),
}
_STALE_S = 1.0
"""A reservation older than this is looked at again before the call goes out: this process may have been frozen."""
_LEASE_GRACE_S = 2.0
_ADVICE_S = 1.0


class StandDown(Exception):
    """Raised by an act that finds, holding its reservation, that it must not be done for now. It did nothing."""


class RetryLater(Exception):
    """A real failure, counted, that may be tried again after `delay` seconds."""

    def __init__(self, failure: Failure, delay: float) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.delay = delay


class Guards:
    """What stands around every call of a process. `worker` names the process in the rows that it reserves."""

    def __init__(self, db: Database, worker: str) -> None:
        self.clock = StoreClock(db)
        self.ledger = Ledger(db, worker, self.clock)
        self.limiter = Limiter(db, self.clock)
        self.places = Places(db, self.clock)
        self.breaker = Breaker(db, self.clock)
        self._shut: set[str] = set()
        self._shut_at = float("-inf")

    async def shut(self) -> set[str]:
        """Targets whose breaker is open, as of a second ago at most: for advice, not for a decision."""
        if time.monotonic() - self._shut_at > _ADVICE_S:
            self._shut_at = time.monotonic()
            self._shut = set(await self.breaker.open_targets())
        return self._shut

    async def close(self) -> None:
        await self.places.close()
        await self.limiter.close()


@dataclass(frozen=True)
class _Entry:
    """A call that was let in: what has to be settled when it has ended."""

    guards: Guards
    call: Call
    tickets: tuple[Ticket, ...]
    passed: Pass

    async def succeeded(self, tokens: int) -> tuple[str, ...]:
        """Tells the limits and the breaker; what a reader of the run should know."""
        for ticket in self.tickets:
            self.guards.limiter.settle(ticket, tokens)
        return _told(await self.guards.breaker.succeeded(self.passed))

    async def failed(self, failure: Failure, *, again: bool) -> tuple[str, ...]:
        """again: the call has failed before. What one call gets that cannot be read says little of its service, so it
        counts once: others may be answered well all the while.
        """
        breaker = self.guards.breaker
        if failure.type is ErrorType.RATE_LIMITED and failure.retry_after and self.passed.target:
            await breaker.pause(self.passed.target, failure.retry_after)
        if again and failure.type is ErrorType.BAD_RESPONSE:
            await breaker.released(self.passed)
            return ()
        return _told(await breaker.failed(self.passed, failure))

    async def left(self) -> None:
        """The call did not go out after all."""
        _give_back(self.guards, self.tickets)
        await self.guards.breaker.released(self.passed)


async def protected(
    guards: Guards, call: Call, act: Act, probe: Act | None = None, tokens: Callable[[Any], int] = lambda _: 0
) -> Settled:
    """Runs the call once at most and returns what is known of it for good.

    DONE with the result; FAILED: it certainly did not happen and trying again will not help; UNKNOWN: it may have
    happened and must not be tried blindly. tokens: what a result has used of a token limit.
    Raises NotYet, NotReady, RetryLater, KeyConflict, and Fenced when another attempt took over.
    """
    recorded = _POINTS[call.kind][2]
    async with _place(guards, call):
        if call.effect is Effect.READ:
            settled = await _repeatable(guards, call, act, tokens)
        else:
            settled = await _once(guards, call, act, probe, tokens)
    faults.reached(recorded, call.name)
    return settled


@asynccontextmanager
async def _place(guards: Guards, call: Call) -> AsyncIterator[None]:
    """A place among the calls in flight, where they are limited. A call that is settled needs none."""
    if call.in_flight is None or await guards.ledger.settled(call):
        yield
    else:
        async with guards.places.held(call.in_flight, call.key):
            yield


# ------------------------------------------------------------------ reads and model calls: repeated freely


async def _repeatable(guards: Guards, call: Call, act: Act, tokens: Callable[[Any], int]) -> Settled:
    """A call that changes nothing outside. A model's answer is kept, and the first one kept is everybody's."""
    reserved, answered, _ = _POINTS[call.kind]
    look = await guards.ledger.look(call, await guards.clock.now())
    if look.settled:
        return look.settled
    since = time.monotonic()
    entry = await _let_in(guards, call, await _take(guards, call), look.shut, look.breaker_failures)
    faults.reached(reserved, call.name)
    try:
        _still_mine(call)
        if time.monotonic() - since > _STALE_S:
            await guards.breaker.check(entry.passed)
        async with _limit(call):
            result = await act(1)
    except NotReady as later:
        _still_mine(call)
        await entry.succeeded(0)  # it was answered
        if look.failures:
            await guards.ledger.forget_failures(call)
        _told_position(call, later)
        raise
    except (RetryLater, NotYet, Fenced, StoreUnavailable):
        await entry.left()  # a call inside this one failed and was counted there, or went to another attempt
        raise
    except asyncio.CancelledError:
        await to_the_end(entry.left())  # its run has ended, or this worker ends: that says nothing about the service
        raise
    except Exception as error:
        _still_mine(call)  # frozen meanwhile: its time-out says nothing about the service
        failure = _classified(call, error)
        notes = await entry.failed(failure, again=look.failures > 0)
        failures = await guards.ledger.count_failure(call, failure)
        if failure.retry and failures <= call.retries:
            raise RetryLater(failure, _delay(call, failures, failure)) from error
        if call.kind == "model":
            await guards.ledger.forget_failures(call)
        return Settled(State.FAILED, None, failure.message, failure.type, failures, notes)
    faults.reached(answered, call.name)
    _still_mine(call)
    notes = await entry.succeeded(tokens(result))
    if call.kind == "model":
        return await guards.ledger.keep(call, result)
    if look.failures:
        await guards.ledger.recovered(call)
    return Settled(State.DONE, result, failures=look.failures, notes=notes)


def _still_mine(call: Call) -> None:
    """Raises Fenced when this process was frozen so long that the server has given the call to another attempt."""
    if lease.lost():
        raise Fenced(f"another attempt has taken over {call.key}")


# ------------------------------------------------------------------ effects: reserved, done once, recorded


async def _once(guards: Guards, call: Call, act: Act, probe: Act | None, tokens: Callable[[Any], int]) -> Settled:
    reserved, answered, _ = _POINTS[call.kind]
    ledger = guards.ledger
    # Before the reservation is asked for: a process frozen until it hears of it would take an old one for new.
    since = time.monotonic()
    # Without a limit the reservation itself looks up; a call that is settled must not use up what others wait for.
    if call.limits and (known := await ledger.settled(call)):
        await guards.breaker.abandoned(call.target, call.key)
        return known
    tickets = await _take(guards, call)
    _still_mine(call)
    held = await ledger.reserve(call, admitted=not call.target)
    entry = await _let_in(guards, call, tickets, held is None, held.breaker_failures if isinstance(held, Grant) else 0)
    if held is None:
        since = time.monotonic()
        _still_mine(call)
        held = await ledger.reserve(call)
        assert held is not None, "the breaker was asked"
    if isinstance(held, Settled):
        await entry.left()
        await guards.breaker.abandoned(call.target, call.key)
        return held
    faults.reached(reserved, call.name)
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
    """Acts under the reservation. `since`: the monotonic time at which it was asked for."""
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
        doubtful = False  # asked by key: it did not happen, and no longer can
    elif doubtful and call.kind == "undo" and (wait := unsettled(call, grant.ended, await entry.guards.clock.now())):
        # It looks before it acts, and would not see what its first request still does.
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
        # A model call inside this one did not come to its answer, or the store is away. Whether this one had acted by
        # then only the tool knows: a `manual` one is taken at its word (`ToolContext.ask_model`), the others can afford
        # the doubt. Without an address there is none, but for what was there before.
        none_sent = isinstance(error, NoAddress) and not doubtful and grant.position is None
        state = State.FAILED if none_sent or call.effect is Effect.MANUAL else State.UNKNOWN
        await ledger.record(call, grant.attempt, state, grant.failures, None, None)
        await entry.left()
        raise
    except Exception as error:  # noqa: BLE001 - every failure of somebody else's code is classified, none is swallowed
        return await _failed(entry, grant, doubtful, _classified(call, error), error)
    faults.reached(answered, call.name)
    return await _done(entry, grant, result, tokens)


async def _ask(entry: _Entry, grant: Grant, probe: Act, tokens: Callable[[Any], int]) -> Settled | None:
    """Asks whether an earlier attempt's request had its effect. None: it had none, and no longer can.

    A service that is still at work on the request says no as well. So its no counts only when the request is older
    than the service needs; until then it is asked again, and without a bound a person says how it ended.
    Raises NotYet.
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
    except Exception as error:  # noqa: BLE001 - every failure of somebody else's code is classified, none is swallowed
        return await _failed(entry, grant, True, _classified(call, error), error, grant.ended)
    faults.reached(Point.PROBED, call.name)
    if found is not None:
        return await _done(entry, grant, found, tokens)
    if call.settles_s is None:
        failure = Failure(ErrorType.UNKNOWN_OUTCOME, no_bound(call), retry=False, maybe_done=True)
        settled = await _give_up(guards.ledger, call, grant, State.UNKNOWN, grant.failures, failure, grant.ended)
        return replace(settled, notes=await entry.succeeded(0))
    if not (wait := unsettled(call, grant.ended, asked)):
        return None
    await guards.ledger.record(call, grant.attempt, State.UNKNOWN, grant.failures, None, None, grant.ended)
    await entry.succeeded(0)  # it was answered
    raise wait


def no_bound(call: Call) -> str:
    """Why the service's no settles nothing."""
    return (
        f"{call.service or call.name} says that {call.name} did not happen, but it may still be at work on the request:"
        " the tool declares no settles_within"
    )


def unsettled(call: Call, ended: float, now: float) -> Unsettled | None:
    """The wait until it makes sense to ask again, while a request that went out may still come to its effect.

    None when it no longer can, and when no bound is declared.
    """
    if call.settles_s is None or now >= (until := ended + call.settles_s):
        return None
    # Seldom while an attempt may still send; then first after as long as that is ago, as a slow service is soon done.
    pause = max(now - ended, call.timeout_s / 5, 1.0)
    at = datetime.fromtimestamp(until, UTC)
    why = f"{call.name}: {call.service or 'its service'} may still be at work on the request, until {at:%H:%M:%S} UTC"
    return Unsettled(min(until - now, pause), why)


def _classified(call: Call, error: Exception) -> Failure:
    failure = classify(error)
    if failure.type is ErrorType.INTERNAL:
        # Its frames only: what an exception says may hold anything.
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
    position = _told_position(call, later)
    if position is None and call.effect is Effect.MANUAL:
        # The next attempt could not tell asking from doing it twice.
        why = f"{call.name} is not ready and told no position, which a tool of class manual has to"
        return await _failed(entry, grant, True, Failure(ErrorType.INTERNAL, why, maybe_done=True), later)
    await entry.guards.ledger.not_ready(call, grant.attempt, later.why, position)
    await entry.succeeded(0)  # it was answered
    raise later


def _told_position(call: Call, later: NotReady) -> Any:
    if later.position is not None:
        heartbeat.advance(call.key, later.position)
        return later.position
    return heartbeat.position(call.key)


async def _failed(
    entry: _Entry, grant: Grant, doubtful: bool, failure: Failure, error: Exception, ended: float | None = None
) -> Settled:
    """Counts the failure; raises RetryLater or settles. ended: as of `Ledger.record`."""
    call, ledger = entry.call, entry.guards.ledger
    # With a position the effect is done, and only the tool itself can say that it came to nothing.
    begun = grant.position is not None
    doubtful = doubtful or failure.maybe_done or (begun and failure.type is not ErrorType.TOOL_FAILED)
    doubtful = doubtful and not call.pure
    state = State.UNKNOWN if doubtful else State.FAILED
    failures = grant.failures + 1
    blind = doubtful and call.effect is Effect.MANUAL and not begun
    # After an ambiguous failure a `probe` tool may always be asked about again, even where the error itself says stop.
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


# ------------------------------------------------------------------ links


async def _take(guards: Guards, call: Call) -> tuple[Ticket, ...]:
    """The rate limits' leave to call now. Raises NotYet."""
    if not call.limits:
        return ()
    tickets = await guards.limiter.take_all(call.limits, call.key, call.tokens)
    faults.reached(Point.LIMITED, call.name)
    return tickets


async def _let_in(guards: Guards, call: Call, tickets: tuple[Ticket, ...], shut: bool, breaker_failures: int) -> _Entry:
    """The breaker's leave to call now: it is closed, or this call is the probe. Raises NotYet."""
    passed = Pass(call.target, call.rule, failures=breaker_failures)
    if shut:
        try:
            passed = await guards.breaker.admit(call.target, call.rule, call.key, 2 * call.timeout_s + _LEASE_GRACE_S)
        except NotYet:
            _give_back(guards, tickets)
            raise
        if passed.version:
            faults.reached(Point.PROBING, call.target)
    return _Entry(guards, call, tickets, passed)


def _give_back(guards: Guards, tickets: tuple[Ticket, ...]) -> None:
    for ticket in tickets:
        guards.limiter.release(ticket)


def _told(change: Change | None) -> tuple[str, ...]:
    """Counts a breaker's change; the words for the run."""
    if change is None:
        return ()
    metrics.breaker_changed(change.target, change.kind)
    return (change.words,)


class NoAnswer(Exception):
    """The call's own limit passed."""

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
        # The breaker's pause says when, and a run that waits for that is woken when a person ends it.
        asked = min(asked, LONGEST_NAP_S)
    return backoff(failures, asked, random.random(), call.longest_delay_s)
