"""The store under several processes, cancelled callers and odd SQL."""

import asyncio
import multiprocessing
import sqlite3
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from holdfast.state.database import Database, StoreUnavailable
from holdfast.state.opening import open_database
from holdfast.testing.patience import PATIENCE_S

INSERT = (
    "INSERT INTO effects (key, key_base, kind, name, version, service, effect, digest, state, attempt, failures,"
    " worker, arguments, reserved_at)"
    " VALUES (?, 'base', 'tool', 'n', '1', 's', 'read', 'd', 'RESERVED', 1, 0, ?, '{}', 0)"
)
RESERVE = INSERT + " ON CONFLICT (key) DO UPDATE SET attempt = effects.attempt + 1 RETURNING attempt"


async def _reserve_often(url: str, worker: str, times: int, keys: int) -> list[int]:
    db = await open_database(url)
    try:
        attempts = []
        for i in range(times):
            row = await db.one(RESERVE, f"key-{i % keys}", worker)
            assert row is not None
            attempts.append(row[0])
            await db.batch([("UPDATE effects SET failures = failures + 1 WHERE key = ?", (f"key-{i % keys}",))])
        return attempts
    finally:
        await db.close()


def _reserve_process(url: str, worker: str, times: int, keys: int) -> list[int]:
    return asyncio.run(_reserve_often(url, worker, times, keys))


def test_processes_share_a_store_without_lost_updates(store_url: str) -> None:
    """8 processes open the store at once and write the same rows: no `locked` error, no attempt lost or doubled."""
    processes, times, keys = 8, 50, 5
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        jobs = [(store_url, f"w{n}", times, keys) for n in range(processes)]
        attempts = sorted(a for got in pool.starmap(_reserve_process, jobs, chunksize=1) for a in got)
    per_key = processes * times // keys
    assert attempts == sorted(list(range(1, per_key + 1)) * keys)

    async def totals() -> list[tuple]:
        db = await open_database(store_url)
        rows = await db.all("SELECT attempt, failures FROM effects")
        await db.close()
        return rows

    assert asyncio.run(totals()) == [(per_key, per_key)] * keys


async def test_a_returning_insert_is_committed_when_one_returns(db: Database, store_url: str) -> None:
    assert await db.one(INSERT + " RETURNING key", "k", "w") == ("k",)
    other = await open_database(store_url)
    assert await other.one("SELECT worker FROM effects WHERE key = ?", "k") == ("w",)
    await other.close()


async def test_run_counts_rows(db: Database) -> None:
    await db.run(INSERT, "a", "w")
    await db.run(INSERT, "b", "w")
    assert await db.run("UPDATE effects SET failures = 1 WHERE key_base = ?", "base") == 2
    assert await db.run("UPDATE effects SET failures = 1 WHERE key_base = ?", "other") == 0
    assert await db.one("SELECT 1 FROM effects WHERE key = ?", "c") is None


async def test_a_batch_is_all_or_nothing(db: Database) -> None:
    with pytest.raises((sqlite3.IntegrityError, psycopg.errors.UniqueViolation)):
        await db.batch([(INSERT, ("a", "w")), (INSERT, ("b", "w")), (INSERT, ("a", "w"))])
    assert await db.all("SELECT key FROM effects") == []
    await db.batch([(INSERT, ("a", "w")), (INSERT, ("b", "w"))])
    assert await db.all("SELECT key FROM effects ORDER BY key") == [("a",), ("b",)]


async def test_question_marks_and_percent_signs_in_sql_are_kept(db: Database) -> None:
    sql = """SELECT 'it''s 100%? %s', ? AS "a?%b" -- really? 5%
             /* and ? %s */ WHERE 'abc' LIKE 'a%' AND ? = 7 % 4"""
    assert await db.one(sql.replace(", ?", ", CAST(? AS TEXT)"), "x?%", 3) == ("it's 100%? %s", "x?%")


async def test_bytes_and_times_come_back_exactly(db: Database) -> None:
    blob, time = bytes(range(256)) * 3, 1_763_712_000.123456
    sql = "INSERT INTO checkpoint_writes VALUES ('t', '', 'c', 'task', -1, 'ch', 'bytes', ?, '')"
    await db.run(sql, blob)
    assert await db.one("SELECT value, idx FROM checkpoint_writes") == (blob, -1)
    await db.run(INSERT, "k", "w")
    await db.run("UPDATE effects SET settled_at = ?", time)
    assert await db.one("SELECT settled_at FROM effects") == (time,)


SLOW = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2e6) SELECT count(*) FROM n",
    "postgresql": "SELECT pg_sleep(1)",
}


@pytest.mark.parametrize("how", ["all", "batch"])
async def test_a_cancelled_caller_leaves_no_transaction_and_no_half(db: Database, store_url: str, how: str) -> None:
    slow = SLOW[db.dialect]
    batch = [(INSERT, ("a", "w")), (slow, ()), (INSERT, ("b", "w"))]
    task = asyncio.ensure_future(db.batch(batch) if how == "batch" else db.all(slow))
    await asyncio.wait([task], timeout=0.05)  # into the slow statement
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The same connections still work, and another client finds no lock in its way.
    await db.run(INSERT, "c", "w")
    other = await open_database(store_url)
    await other.batch([(INSERT, ("d", "w"))])
    keys = [key for (key,) in await other.all("SELECT key FROM effects ORDER BY key")]
    await other.close()
    assert keys in (["c", "d"], ["a", "b", "c", "d"])
    assert await db.one("SELECT count(*) FROM effects") == (len(keys),)


async def test_calls_cancelled_at_any_moment_leave_a_working_store(db: Database) -> None:
    """200 batches cancelled after 0 to 2 ms: each wrote both its rows or none, and every connection goes on."""

    async def pair(n: int) -> None:
        await db.batch([(INSERT, (f"{n}/a", "w")), (INSERT, (f"{n}/b", "w"))])

    for n in range(200):
        task = asyncio.ensure_future(pair(n))
        await asyncio.wait([task], timeout=n % 20 / 10_000)
        task.cancel()
        await asyncio.wait([task])
    await asyncio.gather(*(pair(n) for n in range(1000, 1020)))
    keys = {key for (key,) in await db.all("SELECT key FROM effects")}
    assert {f"{n}/{half}" for n in range(1000, 1020) for half in "ab"} <= keys
    assert all((f"{n}/a" in keys) == (f"{n}/b" in keys) for n in range(200))


@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])
def test_sqlite_waits_for_a_writer_that_holds_the_lock(sqlite_url: str, lock: str) -> None:
    """Another process keeps a write transaction open for a while: opening and writing wait instead of failing."""
    command = [sys.executable, "-c", HOLD, sqlite_url.removeprefix("sqlite:///"), lock]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"

    async def write() -> None:
        db = await open_database(sqlite_url)
        await asyncio.gather(db.run(INSERT, "a", "w"), db.batch([(INSERT, ("b", "w"))]))
        await db.close()

    asyncio.run(write())
    assert holder.wait(PATIENCE_S) == 0


HOLD = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute(f"BEGIN {sys.argv[2]}")
print("held", flush=True)
time.sleep(0.5)
connection.execute("COMMIT")
"""


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://root@db/x", "store address of kind 'mysql'"),
        ("sqlite://", "use sqlite:///<file>"),
        ("sqlite:///:memory:", "use sqlite:///<file>"),
        ("sqlite:////nowhere/at/all.db", "run `uv run starter.py migrate`"),
        ("postgresql://me:hunter2@127.0.0.1:1/x", "cannot reach the Postgres store"),
    ],
)
async def test_a_store_that_cannot_be_opened_is_one_clear_line(url: str, says: str) -> None:
    with pytest.raises(StoreUnavailable) as error:
        await open_database(url)
    assert says in str(error.value)
    assert "\n" not in str(error.value) and "hunter2" not in str(error.value)


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_text("this is no database, " * 100)
    with pytest.raises(StoreUnavailable, match="file is not a database"):
        await open_database(f"sqlite:///{path}")
