"""The protection chain around every model and tool call, in one place and in this order:

    ledger look-up and reservation → (rate limit) → (breaker) → still mine? → timeout → call → classify → record

A recorded result is returned before anything else is asked. The links in brackets come later and go where `_act`
begins; each can answer "not before T" and give the reservation back.

Retries belong to Temporal: a failure that may be tried again leaves as `RetryLater` with its delay, and the ledger
counts it. A crash, a deploy or a wait counts nothing.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from holdfast.contracts import Effect
from holdfast.reliability import faults, lease
from holdfast.reliability.errors import ErrorType, Failure, backoff, classify
from holdfast.reliability.faults import Point
from holdfast.reliability.ledger import Call, Fenced, Grant, Ledger, Settled, State

Act = Callable[[int], Awaitable[Any]]
"""Does the call. Gets the attempt's number, returns JSON data."""

_POINTS = {
    "tool": (Point.RESERVED, Point.EFFECT_DONE, Point.RECORDED),
    "model": (Point.MODEL_RESERVED, Point.MODEL_ANSWERED, Point.MODEL_RECORDED),
    "undo": (Point.UNDO_RESERVED, Point.UNDO_DONE, Point.UNDO_RECORDED),
}
_STALE_S = 1.0
"""A reservation older than this is looked at again before the call goes out: this process may have been frozen."""


class RetryLater(Exception):
    """A real failure, counted, that may be tried again after `delay` seconds."""

    def __init__(self, failure: Failure, delay: float) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.delay = delay


async def protected(ledger: Ledger, call: Call, act: Act, probe: Act | None = None) -> Settled:
    """Runs the call once at most and returns what is known of it for good.

    DONE with the result; FAILED: it certainly did not happen and trying again will not help; UNKNOWN: it may have
    happened and must not be tried blindly. Raises RetryLater, KeyConflict, and Fenced when another attempt took over.
    """
    reserved, answered, recorded = _POINTS[call.kind]
    if call.effect is Effect.READ:
        settled = await _read(ledger, call, act)
    else:
        # Before the reservation is asked for: a process frozen until it hears of it would take an old one for new.
        since = time.monotonic()
        held = await ledger.reserve(call)
        if isinstance(held, Settled):
            return held
        faults.reached(reserved, call.name)
        settled = await _act(ledger, call, held, since, act, probe, answered)
    faults.reached(recorded, call.name)
    return settled


async def _read(ledger: Ledger, call: Call, act: Act) -> Settled:
    reserved, answered, _ = _POINTS[call.kind]
    faults.reached(reserved, call.name)
    try:
        async with _limit(call):
            result = await act(1)
    except (RetryLater, Fenced):
        raise  # a call inside this one failed and was counted there, or went to another attempt
    except Exception as error:
        if lease.lost():  # frozen meanwhile: its time-out says nothing about the service
            raise Fenced(f"another attempt has taken over {call.key}") from error
        failure = classify(error)
        failures = await ledger.count_read_failure(call, failure)
        if failure.retry and failures <= call.retries:
            raise RetryLater(failure, _delay(failures, failure)) from error
        return Settled(State.FAILED, None, failure.message, failure.type, failures)
    faults.reached(answered, call.name)
    if lease.lost():
        raise Fenced(f"another attempt has taken over {call.key}")
    return Settled(State.DONE, result, failures=await ledger.read_recovered(call))


async def _act(
    ledger: Ledger, call: Call, grant: Grant, since: float, act: Act, probe: Act | None, answered: Point
) -> Settled:
    """Acts under the reservation. `since`: the monotonic time at which it was asked for."""
    doubtful = grant.doubtful
    if doubtful and call.effect is Effect.MANUAL:
        message = "an earlier attempt was cut off; whether it happened is not known"
        failure = Failure(ErrorType.UNKNOWN_OUTCOME, message, retry=False, maybe_done=True)
        return await _give_up(ledger, call, grant, State.UNKNOWN, grant.failures, failure)
    try:
        if doubtful and call.effect is Effect.PROBE:
            assert probe is not None
            async with _limit(call):
                found = await probe(grant.attempt)
            if found is not None:
                return await _done(ledger, call, grant, found)
            doubtful = False  # asked by key: it did not happen
        while time.monotonic() - since > _STALE_S:
            since = time.monotonic()
            await ledger.check(call, grant.attempt)
        async with _limit(call):
            result = await act(grant.attempt)
    except Fenced:
        raise
    except RetryLater:
        # A model call inside this one failed and was counted there. Whether this one had acted by then only the tool
        # knows: a `manual` one is taken at its word (`ToolContext.ask_model`), the others can afford the doubt.
        state = State.FAILED if call.effect is Effect.MANUAL else State.UNKNOWN
        await ledger.record(call, grant.attempt, state, grant.failures, None, None)
        raise
    except Exception as error:  # noqa: BLE001 - every failure of somebody else's code is classified, none is swallowed
        return await _failed(ledger, call, grant, doubtful, classify(error), error)
    faults.reached(answered, call.name)
    return await _done(ledger, call, grant, result)


async def _done(ledger: Ledger, call: Call, grant: Grant, result: Any) -> Settled:
    settled = Settled(State.DONE, result, failures=grant.failures)
    await ledger.record(call, grant.attempt, State.DONE, grant.failures, settled, None)
    return settled


async def _failed(
    ledger: Ledger, call: Call, grant: Grant, doubtful: bool, failure: Failure, error: Exception
) -> Settled:
    """Counts the failure; raises RetryLater or settles.

    A model call that is given up is not settled: it did nothing outside, and the next try begins with all its retries.
    """
    doubtful = doubtful or failure.maybe_done
    state = State.UNKNOWN if doubtful and call.kind != "model" else State.FAILED
    failures = grant.failures + 1
    blind = doubtful and call.effect is Effect.MANUAL
    # After an ambiguous failure a `probe` tool may always be asked about again, even where the error itself says stop.
    again = (failure.retry or (doubtful and call.effect is Effect.PROBE)) and not blind
    if again and failures <= call.retries:
        await ledger.record(call, grant.attempt, state, failures, None, failure)
        raise RetryLater(failure, _delay(failures, failure)) from error
    return await _give_up(ledger, call, grant, state, failures, failure)


async def _give_up(ledger: Ledger, call: Call, grant: Grant, state: State, failures: int, failure: Failure) -> Settled:
    settled = Settled(state, None, failure.message, failure.type, failures)
    if call.kind == "model":
        await ledger.record(call, grant.attempt, State.FAILED, 0, None, failure)
    else:
        await ledger.record(call, grant.attempt, state, failures, settled, failure)
    return settled


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


def _delay(failures: int, failure: Failure) -> float:
    return backoff(failures, failure.retry_after, random.random())
