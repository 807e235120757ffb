"""Circuit breakers that all workers share: one row per target says whether calls may go out.

    closed → open                    after `failures` in a row, or a share of a window (`BreakerRule`)
    open → half-open                 one caller holds the probe under a lease; shown as a state, stored as an open row
    half-open → closed | open        by the outcome of the probe; open again for `probe_after_s`

Every change of state raises `version`, and so does taking, returning or ending the probe. A prober whose probe was
taken over therefore changes nothing. `holder`, the idempotency key of its call, identifies a prober. When that call
comes back after a crash, it takes over its own probe at once; another call has to wait until the lease is over and a
probe is due again. Only calls that found the row not closed use `admit`; a call through a closed breaker costs no
statement here.

Times are epoch seconds by the store's clock. The SQL is the same for SQLite and Postgres.
"""

from __future__ import annotations

import random
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from holdfast.authoring.services import BreakerRule
from holdfast.contracts.failures import ErrorType, Failure
from holdfast.reliability.ledger import Fenced
from holdfast.reliability.waiting import NotYet
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database

TRIPS = frozenset(
    {
        ErrorType.UNAVAILABLE,
        ErrorType.TIMEOUT,
        ErrorType.CONNECTION,
        ErrorType.UNREACHABLE,
        ErrorType.BAD_RESPONSE,
    }
)
"""Failures that indicate a sick service."""
ANSWERS = frozenset(
    {
        ErrorType.RATE_LIMITED,
        ErrorType.REFUSED,
        ErrorType.UNAUTHORIZED,
        ErrorType.CONTEXT_OVERFLOW,
        ErrorType.CONTENT_POLICY,
        ErrorType.RAMBLING,
    }
)
"""Failures that indicate a healthy service. Failures in neither set are ours and say nothing about the service."""

JITTER_S = 1.0
"""Seconds over which waiting calls come back. Usually the first one has done the probe when the others come."""
PROBE_S = 5.0
"""Seconds after which a call asks again, at the latest, while another call probes: a probe usually ends before its
lease."""
LONGEST_NAP_S = 60.0
"""Seconds after which a waiting call asks again, at the latest, because `breakers reset` cannot wake waiting calls."""
LONG_PAUSE_S = 30.0
"""Seconds. A service that asks for a longer pause is treated as down: calls are deferred and other work goes on."""


@dataclass(frozen=True)
class Pass:
    """Permission to call a target now. The caller returns it with the outcome. No breaker guards an empty target."""

    target: str
    rule: BreakerRule
    version: int = 0
    """For a prober, the row's version when it took the probe. 0: the breaker was closed."""
    failures: int = 0
    """The failures that the row had counted; a success resets them."""
    lease_s: float = 0.0
    since: float = field(default_factory=time.monotonic)
    """Monotonic time at which the call was admitted."""


@dataclass(frozen=True)
class Change:
    """A change of state that this call caused."""

    target: str
    kind: Literal["opened", "closed", "reopened"]
    words: str
    """A sentence for display."""


@dataclass(frozen=True)
class Row:
    """A breaker's state, for display and for planning."""

    target: str
    state: Literal["closed", "open", "half-open"]
    since: float | None
    """None: it never left this state."""
    failures: int
    next_probe: float | None
    """The time from which a call may be the next probe; None while closed, and while held."""
    prober: str
    """Idempotency key of the call that is the probe, while half-open."""
    paused_until: float | None
    """The service has asked for no calls until this time."""
    held: bool
    """An operator has tripped the breaker; it stays open until an operator resets it."""
    reason: str
    """What opened the breaker, or the last failure counted."""


@dataclass(frozen=True)
class _State:
    """The columns of the row that `admit` needs."""

    state: str
    version: int
    failures: int
    probe_at: float
    prober: str | None
    lease_until: float
    paused_until: float
    held: int
    reason: str


_STATE = """
SELECT state, version, failures, COALESCE(probe_at, 0), prober, lease_until, paused_until, held, reason
FROM breakers WHERE target = ?"""

_INSERT = """
INSERT INTO breakers (target, state, version, failures, window_at, window_calls, window_failures, opened_at, probe_at,
                      lease_until, paused_until, held, reason, changed_at)"""

# Also moves the time of the next probe. If the prober dies, the probe is not repeated before that time.
_TAKE = """
UPDATE breakers SET version = version + 1, prober = ?, lease_until = ?, probe_at = ?
WHERE target = ? AND version = ? AND state = 'open'
RETURNING version"""

_HOLD = "UPDATE breakers SET lease_until = ?, probe_at = ? WHERE target = ? AND version = ?"

_GIVE_BACK = """
UPDATE breakers SET version = version + 1, prober = NULL, lease_until = 0, probe_at = ?
WHERE target = ? AND version = ?"""

_ABANDON = """
UPDATE breakers SET version = version + 1, prober = NULL, lease_until = 0, probe_at = ?
WHERE target = ? AND prober = ?"""

_REOPEN = """
UPDATE breakers SET version = version + 1, failures = failures + 1, prober = NULL, lease_until = 0, probe_at = ?,
    reason = ?
WHERE target = ? AND version = ?
RETURNING failures"""

_CLOSED = """
UPDATE breakers SET state = 'closed', version = version + 1, failures = 0, window_at = 0, window_calls = 0,
    window_failures = 0, prober = NULL, lease_until = 0, held = 0, changed_at = ?"""

_CLOSE = f"{_CLOSED} WHERE target = ? AND version = ? RETURNING opened_at"

_RESET = f"{_CLOSED}, paused_until = 0, reason = ? WHERE target = ?"

_FORGET = "UPDATE breakers SET failures = 0 WHERE target = ? AND state = 'closed' AND failures > 0"

_PAUSE = f"""{_INSERT} VALUES (?, 'closed', 1, 0, 0, 0, 0, NULL, NULL, 0, ?, 0, '', 0)
ON CONFLICT (target) DO UPDATE SET paused_until =
    CASE WHEN breakers.paused_until < excluded.paused_until THEN excluded.paused_until ELSE breakers.paused_until END"""

_TRIP = f"""{_INSERT} VALUES (?, 'open', 1, 0, 0, 0, 0, ?, NULL, 0, 0, 1, ?, ?)
ON CONFLICT (target) DO UPDATE SET state = 'open', version = breakers.version + 1, opened_at = excluded.opened_at,
    probe_at = NULL, prober = NULL, lease_until = 0, held = 1, reason = excluded.reason,
    changed_at = excluded.changed_at"""

_ROW = """
SELECT target, state, changed_at, failures, probe_at, prober, lease_until, paused_until, held, reason FROM breakers"""


@lru_cache(maxsize=256)
def _count(rule: BreakerRule, failed: int) -> str:
    """Returns the statement that counts the end of a call through a closed breaker, and opens it if the rule says so.

    The statement contains the rule's numbers as text, because it needs them many times; `failed` is 1 or 0. The row to
    insert contains the values for an open breaker. Parameters: target, state of a first row, failed, now, failed, now,
    time of the next probe, reason, time of the change of a first row, when the call began.
    """
    fresh = f"breakers.window_at + {rule.window_s!r} <= excluded.window_at"
    calls = f"(CASE WHEN {fresh} THEN 1 ELSE breakers.window_calls + 1 END)"
    window_failures = f"(CASE WHEN {fresh} THEN {failed} ELSE breakers.window_failures + {failed} END)"
    failures = "breakers.failures + 1" if failed else "0"
    reasons: list[str] = []
    if rule.failures is not None:
        reasons.append(f"{failures} >= {rule.failures}")
    if rule.share is not None:
        reasons.append(f"({calls} >= {rule.min_calls} AND {window_failures} >= {rule.share!r} * {calls})")
    opens = " OR ".join(reasons) if failed else "1 = 0"
    reason = "excluded.reason" if failed else "breakers.reason"
    return f"""{_INSERT} VALUES (?, ?, 1, ?, ?, 1, ?, ?, ?, 0, 0, 0, ?, ?)
ON CONFLICT (target) DO UPDATE SET
    state = CASE WHEN {opens} THEN 'open' ELSE 'closed' END,
    version = breakers.version + CASE WHEN {opens} THEN 1 ELSE 0 END,
    failures = {failures},
    window_at = CASE WHEN {fresh} THEN excluded.window_at ELSE breakers.window_at END,
    window_calls = {calls}, window_failures = {window_failures},
    opened_at = excluded.opened_at, probe_at = excluded.probe_at, reason = {reason},
    changed_at = CASE WHEN {opens} THEN excluded.window_at ELSE breakers.changed_at END
WHERE breakers.state = 'closed' AND breakers.changed_at <= ?
RETURNING state, failures, window_calls, window_failures"""


class Breaker:
    """All circuit breakers of one store. Besides the errors that they document, methods raise those of the database."""

    def __init__(self, db: Database, clock: StoreClock, monotonic: Callable[[], float] = time.monotonic) -> None:
        """monotonic: the clock of `Pass.since`."""
        self._db = db
        self._clock = clock
        self._monotonic = monotonic

    async def admit(self, target: str, rule: BreakerRule, holder: str, lease_s: float) -> Pass:
        """Admits a call, possibly as the probe. Raises NotYet.

        holder: the call's idempotency key. lease_s: the longest time in seconds that the call can take as the probe;
        `check` renews this lease.
        """
        while True:
            since, now = self._monotonic(), await self._clock.now()
            found = await self._db.one(_STATE, target)
            if found is None:
                return Pass(target, rule, since=since)
            row = _State(*found)
            if (wait := _must_wait(row, target, rule, holder, now)) is not None:
                raise wait
            if row.state == "closed":
                return Pass(target, rule, failures=row.failures, since=since)
            took = await self._db.one(_TAKE, holder, now + lease_s, now + rule.probe_after_s, target, row.version)
            if took is not None:
                return Pass(target, rule, took[0], row.failures, lease_s, since)
            # Another process has changed the row since the read: read it again.

    async def check(self, passed: Pass) -> None:
        """Renews the lease of a prober that acts late. Raises ledger.Fenced when it has lost the probe."""
        if passed.version:
            now = await self._clock.now()
            terms = (now + passed.lease_s, now + passed.rule.probe_after_s)
            if await self._db.run(_HOLD, *terms, passed.target, passed.version) != 1:
                raise Fenced(f"another call has become the probe of {passed.target}")

    async def succeeded(self, passed: Pass) -> Change | None:
        """Reports that the service answered. Costs no statement if nothing has failed and the rule has no `share`."""
        if passed.version:
            now = await self._clock.now()
            row = await self._db.one(_CLOSE, now, passed.target, passed.version)
            if row is None:
                return None
            words = f"{passed.target} answers again, after {_span(now - row[0])}: its breaker is closed"
            return Change(passed.target, "closed", words)
        if passed.rule.share is not None and passed.target:
            await self._counted(passed, None)
        elif passed.failures and passed.target:
            await self._db.run(_FORGET, passed.target)
        return None

    async def failed(self, passed: Pass, failure: Failure) -> Change | None:
        """Reports a failure: by its kind, counts it, closes the breaker, or changes nothing."""
        if failure.type in ANSWERS:
            return await self.succeeded(passed)
        if failure.type not in TRIPS:
            await self.released(passed)
            return None
        if not passed.target:
            return None
        if not passed.version:
            return await self._counted(passed, failure)
        probe_at = await self._clock.now() + passed.rule.probe_after_s
        row = await self._db.one(_REOPEN, probe_at, _reason(failure), passed.target, passed.version)
        if row is None:
            return None
        words = f"{passed.target} still does not answer: next probe in {_span(passed.rule.probe_after_s)}"
        return Change(passed.target, "reopened", words)

    async def released(self, passed: Pass) -> None:
        """Returns the probe: the call did not go out, or says nothing about its service. The next call may probe."""
        if passed.version:
            await self._db.run(_GIVE_BACK, await self._clock.now(), passed.target, passed.version)

    async def abandoned(self, target: str, holder: str) -> None:
        """Releases the probe of a settled call: its worker may have died between the record and the release."""
        if target:
            await self._db.run(_ABANDON, await self._clock.now(), target, holder)

    async def pause(self, target: str, seconds: float) -> None:
        """Pauses calls for as long as the service asked. The longer of two pauses holds. Does not open the breaker."""
        await self._db.run(_PAUSE, target, await self._clock.now() + seconds)

    async def rows(self) -> list[Row]:
        """Returns all breakers that ever counted anything, sorted by target."""
        return await self._rows(f"{_ROW} ORDER BY target")

    async def open_targets(self) -> dict[str, Row]:
        """Returns the breakers that are open, by hand or by failures, or paused for more than `LONG_PAUSE_S`."""
        long = await self._clock.now() + LONG_PAUSE_S
        return {row.target: row for row in await self._rows(f"{_ROW} WHERE state = 'open' OR paused_until > ?", long)}

    async def trip(self, target: str, why: str, by: str) -> None:
        """Opens a breaker by hand: no call and no probe goes out until an operator resets it."""
        now = await self._clock.now()
        await self._db.run(_TRIP, target, now, f"tripped by {by}: {why}", now)

    async def reset(self, target: str, by: str) -> bool:
        """Closes a breaker by hand, and ends a pause. Returns False when there is no such breaker."""
        return await self._db.run(_RESET, await self._clock.now(), f"reset by {by}", target) == 1

    async def _counted(self, passed: Pass, failure: Failure | None) -> Change | None:
        """Counts the end of a call through a closed breaker, unless the breaker has changed its state since it began.

        A call that began before the breaker opened says nothing about the service after the breaker closed.
        """
        rule, now = passed.rule, await self._clock.now()
        began = now - (self._monotonic() - passed.since)
        failed, reason = (1, _reason(failure)) if failure else (0, "")
        opens = failure and (rule.failures == 1 or (rule.share is not None and rule.min_calls <= 1))
        first = ("open", now) if opens else ("closed", 0.0)
        probe_at = now + rule.probe_after_s
        row = await self._db.one(
            _count(rule, failed), passed.target, first[0], failed, now, failed, now, probe_at, reason, first[1], began
        )
        if row is None or row[0] == "closed":
            return None
        words = f"{passed.target} does not answer ({_why(rule, *row[1:])}): its breaker is open"
        return Change(passed.target, "opened", f"{words}, next probe in {_span(rule.probe_after_s)}")

    async def _rows(self, sql: str, *params: Any) -> list[Row]:
        now = await self._clock.now()
        return [_row(now, *row) for row in await self._db.all(sql, *params)]


def _must_wait(row: _State, target: str, rule: BreakerRule, holder: str, now: float) -> NotYet | None:
    """Returns why this call may not go out now; None: it may, as the probe if the row is open."""
    jitter = random.uniform(0.0, JITTER_S)
    if row.held:
        undo = f"uv run starter.py breakers reset {shlex.quote(target)}"
        words = f"{target} may not be called: {row.reason}; to allow calls again, run `{undo}`"
        return NotYet(min(rule.probe_after_s, LONGEST_NAP_S) + jitter, words, service=target)
    if row.paused_until > now:
        left = row.paused_until - now
        words = f"{target} has asked not to be called for {_span(left)}"
        return NotYet(
            min(left, LONGEST_NAP_S) + jitter,
            words,
            service=target if row.state == "open" or left > LONG_PAUSE_S else "",
        )
    if row.state == "closed" or row.prober == holder:
        return None
    words = f"{target} does not answer: its breaker is open"
    if row.prober is not None and row.lease_until > now:
        left = min(row.lease_until - now, PROBE_S)
        return NotYet(left + jitter, f"{words}, and another call is probing it", service=target)
    if row.probe_at > now:
        return NotYet(min(row.probe_at - now, LONGEST_NAP_S) + jitter, words, service=target)
    return None


def _why(rule: BreakerRule, failures: int, calls: int, window_failures: int) -> str:
    if rule.failures is not None and failures >= rule.failures:
        return f"{failures} failure{'s in a row' if failures > 1 else ''}"
    return f"{window_failures} of {calls} calls within {_span(rule.window_s)} failed"


def _reason(failure: Failure) -> str:
    return f"{failure.type}: {failure.message}"


def _span(seconds: float) -> str:
    """Formats seconds for display: `30 s`, `4 min`."""
    return f"{round(seconds, 1 if seconds < 10 else 0):g} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _row(
    now: float,
    target: str,
    state: str,
    changed_at: float,
    failures: int,
    probe_at: float | None,
    prober: str | None,
    lease_until: float,
    paused_until: float,
    held: int,
    reason: str,
) -> Row:
    probing = prober is not None and lease_until > now
    is_open = state == "open"
    return Row(
        target=target,
        state="half-open" if probing else "open" if is_open else "closed",
        since=changed_at or None,
        failures=failures,
        next_probe=max(probe_at or 0.0, lease_until, paused_until) if is_open and not held else None,
        prober=prober or "" if probing else "",
        paused_until=paused_until if paused_until > now else None,
        held=bool(held),
        reason=reason,
    )
