"""A database that does not answer: every call ends within its limit, and what it may have done is known afterwards."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import TypeVar

import psycopg
import pytest

from holdfast.contracts.failures import ErrorType
from holdfast.contracts.profile import Effect
from holdfast.reliability.chain import Guards, protected
from holdfast.reliability.errors import classify
from holdfast.reliability.ledger import Fenced, Grant, Ledger, Settled, State, tool_call
from holdfast.state import postgres
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database, StoreUnavailable
from holdfast.state.opening import open_database
from holdfast.state.schema import migrate
from holdfast.state.version import VERSION
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.proxy import Proxy

Silent = tuple[Proxy, str]
LIMIT_S = 1.0
T = TypeVar("T")
WRITE = ("INSERT INTO limits (name, version, book) VALUES (?, 1, '') ON CONFLICT (name) DO NOTHING", "n")


async def ended(call: object) -> StoreUnavailable:
    """What a call raises that must not go on for ever."""
    with pytest.raises(StoreUnavailable) as raised:
        await asyncio.wait_for(call, PATIENCE_S)  # pyright: ignore[reportArgumentType]
    said = str(raised.value)
    assert "\n" not in said
    return raised.value


async def again_until_done(call: Callable[[], Awaitable[T]]) -> T:
    """What a call of a store with so short a limit says: on a busy machine its disk may need longer than that."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await call()
        except StoreUnavailable:
            assert time.monotonic() < until


@pytest.mark.parametrize("how", ["all", "run", "batch", "time"])
async def test_a_call_over_a_connection_that_went_silent_ends(silent: Silent, how: str) -> None:
    proxy, url = silent
    db = await open_database(url, LIMIT_S)
    proxy.silence()
    calls = {
        "all": lambda: db.all("SELECT 1"),
        "run": lambda: db.run(*WRITE),
        "batch": lambda: db.batch([(WRITE[0], ("a",)), (WRITE[0], ("b",))]),
        "time": db.time,
    }
    error = await ended(calls[how]())
    assert "did not answer within 1 s" in str(error)
    failure = classify(error)
    assert (failure.type, failure.retry) == (ErrorType.UNAVAILABLE, True)
    proxy.talk()
    # None of the connections that may be silent is handed out again.
    started = time.monotonic()
    await asyncio.wait_for(asyncio.gather(*(db.all("SELECT 1") for _ in range(20))), PATIENCE_S)
    assert proxy.swallowed == 0, f"a silent connection was used again ({time.monotonic() - started:.1f} s)"
    await db.close()


async def test_many_calls_over_a_silent_network_all_end_and_the_store_goes_on(silent: Silent) -> None:
    proxy, url = silent
    db = await open_database(url, LIMIT_S)
    proxy.silence()
    for error in await asyncio.gather(*(ended(db.run(WRITE[0], f"n{n}")) for n in range(40))):
        assert "the call is tried again" not in str(error)  # that is for its caller to say
    proxy.talk()

    await again_until_done(lambda: db.all("SELECT 1"))
    assert await again_until_done(lambda: db.all("SELECT name FROM limits")) == []
    await db.close()


async def test_a_caller_that_is_cancelled_over_a_silent_connection_ends(silent: Silent) -> None:
    proxy, url = silent
    db = await open_database(url, LIMIT_S)
    proxy.silence()
    task = asyncio.ensure_future(db.all("SELECT 1"))
    await asyncio.wait([task], timeout=0.05)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=PATIENCE_S)
    assert done and (task.cancelled() or isinstance(task.exception(), StoreUnavailable))
    proxy.talk()
    assert await again_until_done(lambda: db.all("SELECT 1")) == [(1,)]
    await db.close()


async def test_a_database_that_went_away_and_came_back(silent: Silent) -> None:
    proxy, url = silent
    db = await open_database(url, LIMIT_S)
    proxy.refuse()
    await ended(db.all("SELECT 1"))
    await ended(db.all("SELECT 1"))
    proxy.accept()
    await again_until_done(lambda: db.batch([(WRITE[0], ("back",))]))
    await db.close()


async def test_opening_a_store_that_says_nothing_ends(silent: Silent) -> None:
    proxy, url = silent
    proxy.silence()
    await ended(open_database(url, LIMIT_S))


async def test_a_statement_that_takes_too_long_ends_at_the_server_too(silent: Silent) -> None:
    db = await open_database(silent[1], LIMIT_S)
    assert "statement timeout" in str(await ended(db.all("SELECT pg_sleep(60)")))
    assert await db.one("SHOW idle_in_transaction_session_timeout") == ("1s",)
    await db.close()


async def test_the_limits_of_the_address_win(silent: Silent) -> None:
    db = await open_database(silent[1] + "?options=-c%20work_mem%3D8MB&keepalives_idle=7", LIMIT_S)
    assert await db.one("SHOW work_mem") == ("8MB",)
    await db.close()


async def test_sqlite_waits_for_a_lock_within_the_limit(sqlite_url: str) -> None:
    holder = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    db = await open_database(sqlite_url, LIMIT_S)
    holder.execute("BEGIN IMMEDIATE")
    errors = await asyncio.gather(*(ended(db.run(WRITE[0], f"n{n}")) for n in range(5)))
    assert all("within 1 s" in str(error) for error in errors)
    await again_until_done(lambda: db.all("SELECT 1"))  # readers are not locked out; no write is under way
    holder.execute("COMMIT")
    await again_until_done(lambda: db.run(*WRITE))
    # What was given up was not done behind its caller's back.
    assert await again_until_done(lambda: db.all("SELECT name FROM limits")) == [("n",)]
    await db.close()
    holder.close()


# ------------------------------------------------------------------ a statement that was done and whose answer is lost

CALL = tool_call("run/1", "run", "book", Effect.MANUAL, {}, seq=1)
DONE = Settled(State.DONE, {"order": 7})


class Lossy(Database):
    """A real store, of which the answers to the next `lost` statements get lost after they were done.

    What the proxy does to Postgres, on both databases and exactly once.
    """

    def __init__(self, db: Database) -> None:
        self._db, self.lost, self.dialect = db, 0, db.dialect

    def _lose(self) -> None:
        if self.lost:
            self.lost -= 1
            raise StoreUnavailable("the store did not answer")

    async def all(self, sql: str, *params: object) -> list[tuple]:
        rows = await self._db.all(sql, *params)
        self._lose()
        return rows

    async def run(self, sql: str, *params: object) -> int:
        changed = await self._db.run(sql, *params)
        self._lose()
        return changed

    async def batch(self, statements: object) -> None:
        await self._db.batch(statements)  # pyright: ignore[reportArgumentType]
        self._lose()

    async def time(self) -> float:
        return await self._db.time()

    async def close(self) -> None:
        await self._db.close()


@pytest.fixture
def lossy(db: Database) -> Lossy:
    return Lossy(db)


async def test_a_reservation_whose_answer_is_lost_leaves_no_doubt(lossy: Lossy) -> None:
    ledger = Ledger(lossy, worker="w1")
    lossy.lost = 1
    assert await ledger.reserve(CALL) == Grant(attempt=1, failures=0, doubtful=False)
    # The next attempt is another one, and in doubt as ever.
    lossy.lost = 1
    assert await ledger.reserve(CALL) == Grant(attempt=2, failures=0, doubtful=True)
    lossy.lost = 1
    await ledger.record(CALL, 2, State.DONE, 0, DONE, None)
    lossy.lost = 1
    assert await ledger.reserve(CALL) == DONE


@pytest.mark.parametrize("state", [State.DONE, State.FAILED, State.UNKNOWN])
async def test_a_record_whose_answer_is_lost_is_no_other_attempts(lossy: Lossy, state: State) -> None:
    ledger = Ledger(lossy, worker="w1")
    grant = await ledger.reserve(CALL)
    assert isinstance(grant, Grant)
    lossy.lost = 2
    settled = DONE if state is State.DONE else None
    await ledger.record(CALL, grant.attempt, state, 0, settled, None)
    entry = await ledger.entry(CALL.key)
    assert entry is not None and (entry.state, entry.attempt) == (state, 1)


async def test_a_position_whose_answer_is_lost_is_kept(lossy: Lossy) -> None:
    ledger = Ledger(lossy, worker="w1")
    grant = await ledger.reserve(CALL)
    assert isinstance(grant, Grant)
    lossy.lost = 1
    await ledger.not_ready(CALL, grant.attempt, "at work", {"job": 1})
    again = await ledger.reserve(CALL)
    assert isinstance(again, Grant) and (again.doubtful, again.position) == (False, {"job": 1})


async def test_a_record_that_another_attempt_overtook_while_its_answer_was_lost_is_fenced(db: Database) -> None:
    class Overtaken(Lossy):
        async def run(self, sql: str, *params: object) -> int:
            if not self.lost:
                return await self._db.run(sql, *params)
            self.lost -= 1
            await Ledger(self._db, "w2").reserve(CALL)  # the statement was lost on its way, and this came in between
            raise StoreUnavailable("the store did not answer")

    lossy = Overtaken(db)
    ledger = Ledger(lossy, worker="w1")
    await ledger.reserve(CALL)
    lossy.lost = 1
    with pytest.raises(Fenced):
        await ledger.record(CALL, 1, State.DONE, 0, DONE, None)


async def test_the_answer_lost_on_the_wire(silent: Silent) -> None:
    """The same through the proxy: the statement arrives and is committed, and nothing comes back."""
    proxy, url = silent
    db = await open_database(url, LIMIT_S)
    clock = StoreClock(db)
    await clock.now()  # asked before anything is reserved, and then for a minute not again
    ledger = Ledger(db, worker="w1", clock=clock)
    proxy.silence(answers_only=True)
    reserving = asyncio.ensure_future(ledger.reserve(CALL))
    while not proxy.swallowed:
        await asyncio.sleep(0.01)
    proxy.talk()
    assert await asyncio.wait_for(reserving, PATIENCE_S) == Grant(attempt=1, failures=0, doubtful=False)
    proxy.silence(answers_only=True)
    recording = asyncio.ensure_future(ledger.record(CALL, 1, State.DONE, 0, DONE, None))
    while not proxy.swallowed:
        await asyncio.sleep(0.01)
    proxy.talk()
    await asyncio.wait_for(recording, PATIENCE_S)
    assert await ledger.reserve(CALL) == DONE
    await db.close()


@pytest.mark.parametrize("where", ["before the call", "inside the call"])
async def test_the_stores_failure_is_not_the_services(db: Database, where: str) -> None:
    """The store is away between the reservation and the request: nothing is in doubt, and no breaker counts it."""

    class Away(Lossy):
        async def run(self, sql: str, *params: object) -> int:
            if where == "before the call" and sql.startswith("UPDATE effects SET reserved_at"):
                raise StoreUnavailable("away")
            return await self._db.run(sql, *params)

    async def act(attempt: int) -> str:
        if where == "inside the call":  # it asks a model first, whose answer the ledger would keep
            raise StoreUnavailable("away")
        return "done"

    guards = Guards(Away(db), worker="w1")
    call = replace(CALL, target="hospital/book", service="hospital")
    clock = iter([0.0])
    with pytest.MonkeyPatch.context() as patch:
        if where == "before the call":  # the process stood still for a while after it reserved
            # The name in the module, and not the function that the event loop reads as well.
            still = SimpleNamespace(monotonic=lambda: next(clock, 10.0))
            patch.setattr("holdfast.reliability.chain.time", still)
        with pytest.raises(StoreUnavailable):
            await protected(guards, call, act)
    assert await db.all("SELECT state, failures FROM effects") == [("FAILED", 0)]
    assert await db.all("SELECT failures FROM breakers") == []
    assert await Ledger(db, "w2").reserve(call) == Grant(attempt=2, failures=0, doubtful=False)


def test_a_migration_ends_when_postgres_says_nothing(silent: Silent) -> None:
    proxy, url = silent
    proxy.silence()
    with pytest.raises(StoreUnavailable, match="cannot migrate the store") as raised:
        migrate(url)
    assert "\n" not in str(raised.value)


def test_a_migration_ends_when_postgres_falls_silent_while_it_works(silent: Silent, postgres_url: str) -> None:
    proxy, url = silent
    with psycopg.connect(postgres_url) as holder, ThreadPoolExecutor(1) as pool:
        holder.execute("SELECT pg_advisory_xact_lock(hashtext('holdfast.migrate'))")
        migration = pool.submit(migrate, url)
        waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        until = time.monotonic() + PATIENCE_S
        with psycopg.connect(postgres_url, autocommit=True) as other:
            while other.execute(waits).fetchone() != (1,):
                assert time.monotonic() < until
        proxy.silence()
        error = migration.exception(timeout=PATIENCE_S)
    assert isinstance(error, StoreUnavailable) and "Postgres stopped answering" in str(error)
    assert "\n" not in str(error)


def test_a_long_migration_goes_on_while_postgres_answers(
    silent: Silent, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "ASK_S", 0.05)
    _, url = silent
    asked = 0
    address = postgres.with_limits

    def counted(url: str) -> str:
        nonlocal asked
        asked += 1
        return address(url)

    monkeypatch.setattr(postgres, "with_limits", counted)
    with psycopg.connect(postgres_url) as holder, ThreadPoolExecutor(1) as pool:
        holder.execute("SELECT pg_advisory_xact_lock(hashtext('holdfast.migrate'))")
        migration = pool.submit(migrate, url)
        until = time.monotonic() + PATIENCE_S
        while asked < 5:
            assert time.monotonic() < until and not migration.done()
        holder.rollback()
        assert migration.result(timeout=PATIENCE_S) == (VERSION, VERSION)
