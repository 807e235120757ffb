"""The effect ledger: reserve → execute → record. One row per idempotency key says what is known about an effect.

    RESERVED → DONE | FAILED | UNKNOWN     FAILED → RESERVED on a retry     UNKNOWN → DONE | FAILED once settled
    DONE → COMPENSATED

A row whose `result` is set is settled: that result is returned for its key for ever. `attempt` is the fencing token:
every reservation raises it, and only the attempt that holds it may record. A RESERVED row met by a later attempt
is what "unknown" means: somebody was about to act and nobody knows whether he did.

One statement reserves, one records. The SQL is the same for SQLite and Postgres.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from holdfast.contracts import Effect, Json, digest
from holdfast.reliability.errors import RETRIES, Failure
from holdfast.state.database import Database

Kind = Literal["tool", "undo", "model"]


class State(StrEnum):
    RESERVED = "RESERVED"
    DONE = "DONE"
    FAILED = "FAILED"
    UNKNOWN = "UNKNOWN"
    COMPENSATED = "COMPENSATED"


class KeyConflict(Exception):
    """The key was used before with other arguments."""


class Fenced(Exception):
    """Another attempt has taken this key over; this one must neither act nor record."""


@dataclass(frozen=True)
class Call:
    """One protected call, as the ledger knows it. `arguments` may be None where only their digest is kept (models)."""

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


@dataclass(frozen=True)
class Grant:
    """The right to act, until another attempt takes it."""

    attempt: int
    failures: int
    doubtful: bool
    """An earlier attempt may have acted."""


@dataclass(frozen=True)
class Settled:
    """What is known of a call for good. `result` is the call's own when DONE, else None; `error` says why not."""

    state: State
    result: Any = None
    error: str = ""
    error_type: str = ""
    failures: int = 0

    def dump(self) -> str:
        return json.dumps({"result": self.result, "error": self.error, "error_type": self.error_type})


@dataclass(frozen=True)
class Entry:
    """A row, for people and for counting."""

    key: str
    kind: str
    name: str
    service: str
    effect: str
    state: State
    attempt: int
    failures: int
    worker: str
    settled: Settled | None
    error: str
    reserved_at: float
    settled_at: float | None


# What every row begins with: the call (`Ledger._columns`) and the time.
_INSERT = """
INSERT INTO effects (key, key_base, seq, kind, name, version, service, effect, digest, worker, arguments, reserved_at,
                     prior, state, attempt, failures"""
_VALUES = "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'NEW'"

_RESERVE = f"""{_INSERT}) {_VALUES}, 'RESERVED', 1, 0)
ON CONFLICT (key) DO UPDATE SET prior = effects.state, state = 'RESERVED', attempt = effects.attempt + 1,
    worker = excluded.worker, reserved_at = excluded.reserved_at
WHERE effects.result IS NULL AND effects.digest = excluded.digest
RETURNING attempt, failures, prior"""

_RECORD = """
UPDATE effects SET state = ?, result = ?, error = ?, failures = ?, settled_at = ?
WHERE key = ? AND attempt = ? AND state = 'RESERVED'"""

_COUNT_READ_FAILURE = f"""{_INSERT}, settled_at, error) {_VALUES}, 'FAILED', 1, 1, ?, ?)
ON CONFLICT (key) DO UPDATE SET failures = effects.failures + 1, attempt = effects.attempt + 1,
    state = 'FAILED', settled_at = excluded.settled_at, error = excluded.error, worker = excluded.worker
RETURNING failures"""

_SEIZE = f"""{_INSERT}, settled_at, result) {_VALUES}, 'FAILED', 1, 0, ?, ?)
ON CONFLICT (key) DO UPDATE SET attempt = effects.attempt + CASE WHEN effects.result IS NULL THEN 1 ELSE 0 END,
    state = CASE effects.state WHEN 'RESERVED' THEN 'UNKNOWN' ELSE effects.state END,
    result = COALESCE(effects.result, excluded.result)
RETURNING state, result"""

_ENTRY = (
    "SELECT key, kind, name, service, effect, state, attempt, failures, worker, result, error, reserved_at, settled_at"
    " FROM effects"
)


class Ledger:
    """The ledger over one store. `worker` names this process in the rows it reserves."""

    def __init__(self, db: Database, worker: str) -> None:
        self._db = db
        self._worker = worker

    async def reserve(self, call: Call) -> Grant | Settled:
        """Takes the right to act on the key, or returns what is already settled.

        Raises KeyConflict when the key was used with other arguments.
        """
        row = await self._db.one(_RESERVE, *self._columns(call), time.time())
        if row is not None:
            attempt, failures, prior = row
            return Grant(attempt, failures, doubtful=prior in (State.RESERVED, State.UNKNOWN))
        found = await self._db.one("SELECT state, digest, result, failures FROM effects WHERE key = ?", call.key)
        if found is None:  # deleted between the two statements: an operator's doing, so begin again
            return await self.reserve(call)
        state, used, result, failures = found
        if used != call.digest:
            raise KeyConflict(f"key {call.key} was used before with other arguments for {call.name}")
        return _settled(state, result, failures)

    async def known(self, key: str) -> Settled | None:
        """What is known of a key: settled, unknown while an attempt is open, None when it was never reserved."""
        row = await self._db.one("SELECT state, result, failures FROM effects WHERE key = ?", key)
        if row is None:
            return None
        state, result, failures = row
        if result:
            return _settled(state, result, failures)
        return Settled(State.UNKNOWN, error="an earlier attempt was cut off", failures=failures)

    async def check(self, call: Call, attempt: int) -> None:
        """Raises Fenced unless this attempt still holds the key."""
        row = await self._db.one("SELECT attempt, state FROM effects WHERE key = ?", call.key)
        if row is None or row[0] != attempt or row[1] != State.RESERVED:
            raise Fenced(f"another attempt has taken over {call.key}")

    async def record(
        self, call: Call, attempt: int, state: State, failures: int, settled: Settled | None, failure: Failure | None
    ) -> None:
        """Records how the attempt ended; `settled` only when for good. Raises Fenced when it no longer holds."""
        changed = await self._db.run(
            _RECORD,
            state,
            settled.dump() if settled else None,
            f"{failure.type}: {failure.message}" if failure else None,
            failures,
            time.time(),
            call.key,
            attempt,
        )
        if changed != 1:
            raise Fenced(f"another attempt has taken over {call.key}")

    async def count_read_failure(self, call: Call, failure: Failure) -> int:
        """Counts a real failure of a read, which is the only thing the ledger knows of reads. The number so far."""
        now = time.time()
        row = await self._db.one(
            _COUNT_READ_FAILURE, *self._columns(call), now, now, f"{failure.type}: {failure.message}"
        )
        assert row is not None
        return row[0]

    async def read_recovered(self, call: Call) -> int:
        """Marks a read that failed before as done; the failures it took (0 when it never failed)."""
        row = await self._db.one(
            "UPDATE effects SET state = 'DONE', settled_at = ? WHERE key = ? RETURNING failures", time.time(), call.key
        )
        return row[0] if row else 0

    async def seize(self, call: Call, why: str) -> tuple[State, Any]:
        """Closes a key before its undo: from here on no attempt of the call can act or record.

        Returns the state and the recorded result. Whatever was not settled is settled now, also a key that was never
        reserved, so that a frozen worker that wakes after the undo, or a retry that comes late, does not act. A second
        time it changes nothing.
        """
        now = time.time()
        never = Settled(State.FAILED, error=why, error_type="undone").dump()
        row = await self._db.one(_SEIZE, *self._columns(call), now, now, never)
        assert row is not None
        state, result = row
        return State(state), json.loads(result)["result"]

    async def compensated(self, key: str) -> None:
        """Marks an effect as undone."""
        await self._db.run("UPDATE effects SET state = 'COMPENSATED' WHERE key = ? AND state <> 'FAILED'", key)

    async def entries(self, key_base: str) -> list[Entry]:
        """All rows of one run in the order of their reservation."""
        rows = await self._db.all(f"{_ENTRY} WHERE key_base = ? ORDER BY reserved_at, key", key_base)
        return [_entry(row) for row in rows]

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
            self._worker,
            arguments or "",
        )


def tool_call(key: str, key_base: str, name: str, effect: Effect, arguments: Json, **more: Any) -> Call:
    """A call of kind `tool`; the digest covers the tool's name and arguments."""
    return Call(key, key_base, "tool", name, effect, arguments, digest([name, arguments]), **more)


def _settled(state: str, result: str, failures: int) -> Settled:
    body = json.loads(result)
    return Settled(State(state), body["result"], body["error"], body["error_type"], failures)


def _entry(row: tuple[Any, ...]) -> Entry:
    key, kind, name, service, effect, state, attempt, failures, worker, result, error, reserved_at, settled_at = row
    settled = _settled(state, result, failures) if result else None
    return Entry(
        key, kind, name, service, effect, State(state), attempt, failures, worker, settled, error or "",
        reserved_at, settled_at,
    )  # fmt: skip
