"""The effect ledger: reserve → execute → record. One row per idempotency key holds what is known about an effect.

    RESERVED → DONE | FAILED | UNKNOWN     FAILED → RESERVED on a retry     UNKNOWN → DONE | FAILED once settled
    DONE → COMPENSATED

A row whose `result` is set is settled: the ledger always returns that result for its key, unless a person reopens it.
`attempt` is the fencing token: every reservation raises it, and only the attempt that holds it may record. When a later
attempt finds a RESERVED row, the outcome is "unknown": an earlier attempt was about to act, and may have acted.

One statement reserves, one records. The SQL is the same for SQLite and Postgres.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, TypeVar

from holdfast.authoring.services import BreakerRule, InFlight, Limit
from holdfast.contracts.data import Json, digest
from holdfast.contracts.failures import ErrorType, Failure
from holdfast.contracts.profile import Effect
from holdfast.reliability.errors import LONGEST_DELAY, RETRIES
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database, Row, StoreUnavailable

Kind = Literal["tool", "undo", "model", "hook"]


T = TypeVar("T")

LOST_S, AGAIN_S = 20.0, 0.2
"""Seconds for which a reservation or record is sent again when its answer was lost, and the pause between attempts."""


UNDONE = "undone"
"""`error_type` of a call that its undo closed before it began."""


class State(StrEnum):
    RESERVED = "RESERVED"
    DONE = "DONE"
    FAILED = "FAILED"
    UNKNOWN = "UNKNOWN"
    COMPENSATED = "COMPENSATED"


class KeyConflict(Exception):
    """The key was used before with other arguments."""


class Fenced(Exception):
    """Another attempt has taken over this key; this one must neither act nor record."""


@dataclass(frozen=True)
class Call:
    """One protected call. `arguments` is None where the ledger keeps only their digest (model calls)."""

    key: str
    key_base: str
    kind: Kind
    name: str
    effect: Effect
    arguments: Json | None
    digest: str
    version: str = "1"
    service: str = ""
    seq: int | None = None
    timeout_s: float = 10.0
    retries: int = RETRIES
    longest_delay_s: float = LONGEST_DELAY
    """The longest pause between two attempts, in seconds."""
    agent: str = ""
    target: str = ""
    """The target of the circuit breaker that guards the call; empty for none."""
    rule: BreakerRule = field(default_factory=BreakerRule)
    limits: tuple[Limit, ...] = ()
    in_flight: InFlight | None = None
    """How many calls like this one may be in flight at once; None: any number."""
    tokens: int = 0
    """Estimated tokens, for a token limit; replaced by the real usage when the call is settled."""
    pure: bool = False
    """The call changes nothing outside, so it is never in doubt."""
    settles_s: float | None = None
    """A request that had no effect this many seconds after it went out never has one. None: the tool declares none."""


@dataclass(frozen=True)
class Grant:
    """The right to act, until another attempt takes over."""

    attempt: int
    failures: int
    doubtful: bool
    """An earlier attempt may have acted."""
    breaker_failures: int = 0
    """The failures that the circuit breaker has counted; a success has to reset them."""
    ended: float = field(default=0.0, compare=False)
    """When doubtful: the latest time, by the store's clock, at which a request of an earlier attempt went out."""
    position: Any = None
    """Set when an earlier attempt did the effect and its result was not ready: only the result has to be asked for."""


@dataclass(frozen=True)
class Look:
    """What the ledger has on a call that needs no reservation."""

    settled: Settled | None
    failures: int
    """Real failures of this call so far."""
    shut: bool
    """The circuit breaker is not closed, or paused: it has to admit the call."""
    breaker_failures: int


@dataclass(frozen=True)
class Settled:
    """The final state of a call. `result` is the call's result when DONE, else None, and `error` says why."""

    state: State
    result: Any = None
    error: str = ""
    error_type: str = ""
    failures: int = 0
    notes: tuple[str, ...] = ()
    """What happened during the call that a reader of the run should know. The ledger does not store it."""

    def dump(self) -> str:
        return json.dumps({"result": self.result, "error": self.error, "error_type": self.error_type})


@dataclass(frozen=True)
class Entry:
    """A row of the ledger, for display and for counting."""

    key: str
    key_base: str
    seq: int | None
    kind: str
    name: str
    version: str
    service: str
    effect: str
    agent: str
    arguments: Json | None
    state: State
    attempt: int
    failures: int
    worker: str
    settled: Settled | None
    error: str
    log: list[Json]
    """The failed attempts, oldest first: `at` (epoch seconds), `worker`, `error`."""
    reserved_at: float
    settled_at: float | None


# The first columns of every row: the call (`Ledger._columns`) and the time.
_INSERT = """
INSERT INTO effects (key, key_base, seq, kind, name, version, service, effect, digest, agent, worker, arguments,
                     reserved_at, prior, state, attempt, failures"""
_NEW = "?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'NEW'"

_SHUT = "SELECT 1 FROM breakers WHERE target = ? AND (state <> 'closed' OR paused_until > ?)"
"""The reservation itself checks the circuit breaker, so the check needs no statement of its own."""

_SLACK_S = 1.0
"""Seconds. An attempt renews its reservation before it acts, unless the reservation is younger than this."""
_ENDED = """CASE WHEN effects.state = 'RESERVED' OR effects.settled_at IS NULL THEN
    effects.reserved_at + ? * CASE WHEN effects.prior IN ('RESERVED', 'UNKNOWN') THEN 2.0 ELSE 1.0 END
    ELSE effects.settled_at END"""
"""When the last attempt that may have acted had ended. An attempt that was cut off may have acted until its timeout.
It had twice that time if it asked the service first. Parameter: the timeout."""

_RESERVE = f"""{_INSERT}) SELECT {_NEW}, 'RESERVED', 1, 0 WHERE NOT EXISTS ({_SHUT})
ON CONFLICT (key) DO UPDATE SET prior = effects.state, state = 'RESERVED', attempt = effects.attempt + 1,
    worker = excluded.worker, reserved_at = excluded.reserved_at, settled_at = {_ENDED}
WHERE effects.result IS NULL AND effects.digest = excluded.digest
RETURNING attempt, failures, prior, position, settled_at, (SELECT b.failures FROM breakers b WHERE b.target = ?)"""

_RESERVED = """
SELECT attempt, failures, prior, position, settled_at,
    (SELECT b.failures FROM breakers b WHERE b.target = ?)
FROM effects WHERE key = ? AND state = 'RESERVED' AND worker = ? AND reserved_at = ?"""
"""Finds the reservation that this process made at exactly this time."""

_MINE = "SELECT 1 FROM effects WHERE key = ? AND attempt = ? AND state <> 'RESERVED'"
"""Only the attempt that holds a key writes to its row without raising the attempt."""

_STANDS = """CASE WHEN EXISTS (
    SELECT 1 FROM effects u WHERE u.key = e.key || '/undo'
    AND (u.state = 'DONE' OR (u.state <> 'FAILED' AND e.state <> 'FAILED')))
    THEN 'COMPENSATED' ELSE e.state END"""
"""The state of row `e`. An effect whose undo has begun counts as compensated: the undo may be ahead of its record."""

_FOUND = f"SELECT {_STANDS}, digest, result, failures FROM effects e WHERE key = ?"

_LOOK = f"""
SELECT {_STANDS}, e.digest, e.result, e.failures, b.failures, b.state, b.paused_until
FROM (SELECT 1 AS one) AS always LEFT JOIN effects e ON e.key = ? LEFT JOIN breakers b ON b.target = ?"""

# The log of failures is bounded, as the model call of a parked run may fail for days.
_LOG = """log = CASE WHEN length(COALESCE(effects.log, '')) < 20000
    THEN COALESCE(effects.log, '') || COALESCE(?, '') ELSE effects.log END"""

_RECORD = f"""
UPDATE effects SET state = ?, result = ?, error = ?, failures = ?, settled_at = ?, {_LOG}
WHERE key = ? AND attempt = ? AND state = 'RESERVED'"""

_NOT_READY = """
UPDATE effects SET state = 'UNKNOWN', failures = 0, error = ?, position = ?, settled_at = ?
WHERE key = ? AND attempt = ? AND state = 'RESERVED'"""

_COUNT_FAILURE = f"""{_INSERT}, settled_at, error, log) VALUES ({_NEW}, 'FAILED', 1, 1, ?, ?, ?)
ON CONFLICT (key) DO UPDATE SET failures = effects.failures + 1, attempt = effects.attempt + 1, state = 'FAILED',
    settled_at = excluded.settled_at, error = excluded.error, worker = excluded.worker, {_LOG}
WHERE effects.result IS NULL
RETURNING failures"""

_KEEP = f"""{_INSERT}, settled_at, result) VALUES ({_NEW}, 'DONE', 1, 0, ?, ?)
ON CONFLICT (key) DO UPDATE SET state = 'DONE', result = COALESCE(effects.result, excluded.result),
    attempt = effects.attempt + 1, settled_at = excluded.settled_at
WHERE effects.digest = excluded.digest
RETURNING state, result, failures"""

_SEIZE = f"""{_INSERT}, settled_at, result) VALUES ({_NEW}, 'FAILED', 1, 0, ?, ?)
ON CONFLICT (key) DO UPDATE SET attempt = effects.attempt + CASE WHEN effects.result IS NULL THEN 1 ELSE 0 END,
    state = CASE effects.state WHEN 'RESERVED' THEN 'UNKNOWN' ELSE effects.state END,
    result = COALESCE(effects.result, excluded.result), settled_at = {_ENDED}
RETURNING state, result, settled_at"""

_GIVE_WAY = f"""{_INSERT}, settled_at, result) VALUES ({_NEW}, 'FAILED', 1, 0, ?, ?)
ON CONFLICT (key) DO UPDATE SET attempt = effects.attempt + 1, result = COALESCE(effects.result, excluded.result)
WHERE effects.state = 'FAILED'
RETURNING state"""

_SETTLE = """
UPDATE effects SET state = ?, result = ?, attempt = attempt + 1, settled_at = ?
WHERE key = ? AND state IN ('RESERVED', 'UNKNOWN', 'FAILED') AND (result IS NULL OR result <> ?)"""

_REOPEN = """
UPDATE effects SET result = NULL, failures = 0, attempt = attempt + 1,
    position = CASE state WHEN 'FAILED' THEN NULL ELSE position END
WHERE key = ? AND state IN ('FAILED', 'UNKNOWN')"""

_COLUMNS = (
    "key, key_base, seq, kind, name, version, service, effect, agent, arguments, state, attempt, failures,"
    " worker, result, error, log, reserved_at, settled_at"
)
_ENTRY = f"SELECT {_COLUMNS} FROM effects"


class Ledger:
    """The ledger in one store. worker: the name of this process in the rows that it reserves.

    Times that affect decisions (`reserved_at`, and `settled_at` of a call in doubt) are by the store's clock.
    """

    def __init__(self, db: Database, worker: str, clock: StoreClock | None = None) -> None:
        self._db = db
        self._worker = worker
        self._clock = clock or StoreClock(db)

    async def reserve(self, call: Call, *, admitted: bool = True) -> Grant | Settled | None:
        """Reserves the key, or returns the settled state.

        None: nothing is settled, and the call's circuit breaker has to admit the call first.
        admitted: the breaker has admitted it.
        Raises KeyConflict when the key was used with other arguments.
        """
        guard, now, longest = "" if admitted else call.target, await self._clock.now(), call.timeout_s + _SLACK_S
        row = await _retry_if_lost(
            lambda: self._db.one(_RESERVE, *self._columns(call), now, guard, now, longest, call.target),
            lambda: self._db.one(_RESERVED, call.target, call.key, self._worker, now),
        )
        if row is not None:
            attempt, failures, prior, position, ended, breaker_failures = row
            # With a position, the earlier attempt only asked for its result, so it adds no doubt.
            doubtful = prior in (State.RESERVED, State.UNKNOWN) and position is None
            at = None if position is None else json.loads(position)
            # In a row of an older build, the time is the worker's, whose clock may be wrong.
            ended = min(ended or 0.0, now + 2 * longest)
            return Grant(attempt, failures, doubtful, breaker_failures or 0, ended, at)
        found = await self._db.one(_FOUND, call.key)
        if found is None or (found[1] == call.digest and found[2] is None):
            if not admitted:
                return None
            return await self.reserve(call)  # an operator deleted or reopened the row between the two statements
        state, used, result, failures = found
        _same(call, used)
        return _settled(state, result, failures)

    async def look(self, call: Call, now: float) -> Look:
        """Returns what is known before a call without a reservation. now: the store's time. Raises KeyConflict."""
        row = await self._db.one(_LOOK, call.key, call.target)
        assert row is not None
        state, used, result, failures, breaker_failures, breaker, paused_until = row
        if used is not None:
            _same(call, used)
        shut = breaker is not None and (breaker != "closed" or paused_until > now)
        settled = _settled(state, result, failures) if result else None
        return Look(settled, failures or 0, shut, breaker_failures or 0)

    async def settled(self, call: Call) -> Settled | None:
        """Returns the settled state, or None. Raises KeyConflict."""
        return (await self.look(call, 0.0)).settled

    async def known(self, key: str) -> Settled | None:
        """Returns what is known of a key: its settled state, UNKNOWN while it is not settled, None without a row."""
        row = await self._db.one("SELECT state, result, failures FROM effects WHERE key = ?", key)
        if row is None:
            return None
        state, result, failures = row
        if result:
            return _settled(state, result, failures)
        return Settled(State.UNKNOWN, error="an earlier attempt was cut off", failures=failures)

    async def renew(self, call: Call, attempt: int) -> None:
        """Renews the reservation of an attempt that is about to act late. Raises Fenced when it lost the key."""
        sql = "UPDATE effects SET reserved_at = ? WHERE key = ? AND attempt = ? AND state = 'RESERVED'"
        if await self._db.run(sql, await self._clock.now(), call.key, attempt) != 1:
            raise Fenced(f"another attempt has taken over {call.key}")

    async def record(
        self,
        call: Call,
        attempt: int,
        state: State,
        failures: int,
        settled: Settled | None,
        failure: Failure | None,
        ended: float | None = None,
    ) -> None:
        """Records how the attempt ended. Raises Fenced when it no longer holds the key.

        settled: set only if the outcome is final. ended: given by an attempt that sent nothing while an earlier one is
        in doubt: when the earlier one had ended.
        """
        error, log = self._log(failure)
        dump = settled.dump() if settled else None
        now = await self._clock.now() if state is State.UNKNOWN else time.time()
        at = now if ended is None else ended
        done = await _retry_if_lost(
            lambda: self._db.run(_RECORD, state, dump, error, failures, at, log, call.key, attempt),
            lambda: self._db.one(f"{_MINE} AND settled_at = ?", call.key, attempt, at),
        )
        if not done:
            raise Fenced(f"another attempt has taken over {call.key}")

    async def not_ready(self, call: Call, attempt: int, why: str, position: Any) -> None:
        """Records that the effect is done and its result is not ready, which is no failure. Raises Fenced."""
        at = None if position is None else json.dumps(position)
        now = await self._clock.now()
        done = await _retry_if_lost(
            lambda: self._db.run(_NOT_READY, why, at, now, call.key, attempt),
            lambda: self._db.one(f"{_MINE} AND error = ?", call.key, attempt, why),
        )
        if not done:
            raise Fenced(f"another attempt has taken over {call.key}")

    async def keep(self, call: Call, result: Any) -> Settled:
        """Records the result of a call without a reservation. All attempts get the first recorded result."""
        now = time.time()
        row = await self._db.one(_KEEP, *self._columns(call), now, now, Settled(State.DONE, result).dump())
        if row is None:
            raise _conflict(call)
        return _settled(*row)

    async def count_failure(self, call: Call, failure: Failure) -> int:
        """Counts a real failure of a call without a reservation. Returns the number so far."""
        now = time.time()
        error, log = self._log(failure)
        row = await self._db.one(_COUNT_FAILURE, *self._columns(call), now, now, error, log, log)
        return row[0] if row else 1  # no row: another attempt got its answer in the meantime

    async def forget_failures(self, call: Call) -> None:
        """Resets the count of failures, so that the next attempt has all its retries."""
        await self._db.run("UPDATE effects SET failures = 0 WHERE key = ? AND result IS NULL", call.key)

    async def recovered(self, call: Call) -> None:
        """Marks a read that failed before as done."""
        await self._db.run("UPDATE effects SET state = 'DONE', settled_at = ? WHERE key = ?", time.time(), call.key)

    async def ended(self, call: Call) -> float | None:
        """Returns the latest time at which an attempt may have acted. None: the call is not in doubt."""
        sql = f"SELECT {_ENDED} FROM effects WHERE key = ? AND state IN ('RESERVED', 'UNKNOWN')"
        row = await self._db.one(sql, call.timeout_s + _SLACK_S, call.key)
        return row[0] if row else None

    async def seize(self, call: Call, why: str, kind: str = UNDONE) -> tuple[State, Any, float]:
        """Closes a key before its undo: after this no attempt of the call can act or record.

        Returns the state, the recorded result, and the latest time at which an attempt may have acted. It settles a key
        that is not settled, even one that was never reserved, so that a frozen worker that wakes after the undo, or a
        late retry, does not act. Idempotent.
        """
        now, longest = await self._clock.now(), call.timeout_s + _SLACK_S
        never = Settled(State.FAILED, error=why, error_type=kind).dump()
        row = await self._db.one(_SEIZE, *self._columns(call), now, now, never, longest)
        assert row is not None
        state, result, ended = row
        return State(state), json.loads(result)["result"], min(ended, now + 2 * longest)

    async def give_way(self, call: Call, why: str) -> bool:
        """Closes a key that certainly did nothing, so that a fallback can replace it. False if it may have acted."""
        now = time.time()
        never = Settled(State.FAILED, error=why, error_type=ErrorType.UNAVAILABLE).dump()
        return await self._db.one(_GIVE_WAY, *self._columns(call), now, now, never) is not None

    async def compensated(self, key: str) -> None:
        """Marks an effect as undone."""
        await self._db.run("UPDATE effects SET state = 'COMPENSATED' WHERE key = ? AND state <> 'FAILED'", key)

    async def settle(self, key: str, happened: bool, result: Any, note: str) -> bool:
        """Records what a person or a probe found out about a call that is not DONE: whether it happened.

        Returns False when there is nothing to settle: the key is unknown, the call is known to be done, or the same
        finding is recorded. Fences every attempt that is under way.
        """
        settled = Settled(State.DONE, result) if happened else Settled(State.FAILED, None, note, "settled")
        dump = settled.dump()
        return await self._db.run(_SETTLE, settled.state, dump, time.time(), key, dump) == 1

    async def reopen(self, key: str) -> bool:
        """Reopens a call that is FAILED or UNKNOWN: it can be attempted again under its key, with all its retries."""
        return await self._db.run(_REOPEN, key) == 1

    async def entry(self, key: str) -> Entry | None:
        row = await self._db.one(f"{_ENTRY} WHERE key = ?", key)
        return _entry(row) if row else None

    async def entries(self, key_base: str) -> list[Entry]:
        """Returns all rows of one run in the order of their reservation."""
        rows = await self._db.all(f"{_ENTRY} WHERE key_base = ? ORDER BY reserved_at, key", key_base)
        return [_entry(row) for row in rows]

    async def models(self, key_base: str, prefix: str) -> list[Settled]:
        """Returns a run's model calls whose keys begin with `prefix`, oldest first.

        Each is an answer (DONE), or what an answer cost that was cut (FAILED).
        """
        rows = await self._db.all(
            "SELECT state, result, failures FROM effects WHERE key_base = ? AND kind = 'model'"
            " AND substr(key, 1, length(?)) = ? AND result IS NOT NULL ORDER BY settled_at, key",
            *(key_base, prefix, prefix),
        )
        return [_settled(*row) for row in rows]

    async def cut(self, call: Call, sent_as: str, failure: Failure, usage: Json) -> int:
        """Records, in a row of its own, what a model call cost whose answer was cut in the middle.

        sent_as: the key that the model saw. Returns how many calls under that key were cut for this kind of failure.
        """
        now = time.time()
        row = replace(call, key=f"{sent_as}/cut-{secrets.token_hex(4)}")
        kept = Settled(State.FAILED, {"usage": usage}, failure.message, failure.type).dump()
        sql = f"{_INSERT}, settled_at, result) VALUES ({_NEW}, 'FAILED', 1, 1, ?, ?) ON CONFLICT (key) DO NOTHING"
        await self._db.run(sql, *self._columns(row), now, now, kept)
        found = await self.models(call.key_base, f"{sent_as}/cut-")
        return sum(each.error_type == failure.type for each in found)

    def _columns(self, call: Call) -> tuple[Any, ...]:
        arguments = None if call.arguments is None else json.dumps(call.arguments, ensure_ascii=False)
        return (
            call.key,
            call.key_base,
            call.seq,
            call.kind,
            call.name,
            call.version,
            call.service,
            call.effect,
            call.digest,
            call.agent,
            self._worker,
            arguments or "",
        )

    def _log(self, failure: Failure | None) -> tuple[str | None, str | None]:
        """Returns the error as text, and its line in the log of attempts."""
        if failure is None:
            return None, None
        error = f"{failure.type}: {failure.message}"
        return error, json.dumps({"at": round(time.time(), 3), "worker": self._worker, "error": error}) + "\n"


async def _retry_if_lost(ask: Callable[[], Awaitable[T]], done: Callable[[], Awaitable[T | Row | None]]) -> T | Row:
    """Runs a statement, and runs it again when its answer was lost, so that its outcome is certain.

    ask: runs the statement. done: checks whether it already took effect, and returns a substitute for its answer, else
    None. Raises StoreUnavailable when the store is unavailable for longer than `LOST_S`; the next attempt then treats
    this one as crashed.
    """
    until = time.monotonic() + LOST_S
    lost = False
    while True:
        try:
            return (lost and await done()) or await ask()
        except StoreUnavailable:
            if time.monotonic() > until:
                raise
            lost = True
            await asyncio.sleep(AGAIN_S)


def tool_call(key: str, key_base: str, name: str, effect: Effect, arguments: Json, **more: Any) -> Call:
    """Returns a call of kind `tool`. The digest covers the tool's name and arguments."""
    return Call(key, key_base, "tool", name, effect, arguments, digest([name, arguments]), **more)


def _settled(state: str, result: str, failures: int) -> Settled:
    body = json.loads(result)
    return Settled(State(state), body["result"], body["error"], body["error_type"], failures)


def _same(call: Call, used: str) -> None:
    if used != call.digest:
        raise _conflict(call)


def _conflict(call: Call) -> KeyConflict:
    return KeyConflict(f"key {call.key} was used before with other arguments for {call.name}")


def _entry(row: tuple[Any, ...]) -> Entry:
    found = dict(zip(_COLUMNS.split(", "), row, strict=True))
    state, result = State(found["state"]), found.pop("result")
    return Entry(
        **found
        | {
            "state": state,
            "settled": _settled(state, result, found["failures"]) if result else None,
            "agent": found["agent"] or "",
            "error": found["error"] or "",
            "arguments": json.loads(found["arguments"]) if found["arguments"] else None,
            "log": [json.loads(line) for line in (found["log"] or "").splitlines()],
        }
    )
