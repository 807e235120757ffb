"""The store in one SQLite file."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from holdfast.state.database import Database, Row, Statement, StoreUnavailable

T = TypeVar("T")

BUSY_S = 10.0
"""Seconds that SQLite itself waits for another process's write lock."""
GIVE_UP_S = 30.0
"""Seconds after which a call that still meets a lock fails."""


class Sqlite(Database):
    """One connection in one thread. Calls of one process queue there: SQLite has one writer anyway.

    A job is a whole transaction and runs to its end in the thread whatever becomes of its caller, so a cancelled caller
    leaves no transaction open.
    """

    dialect = "sqlite"

    def __init__(self, jobs: _Jobs, connection: sqlite3.Connection) -> None:
        self._jobs = jobs
        self._connection = connection

    @classmethod
    async def open(cls, path: Path) -> Sqlite:
        jobs = _Jobs()
        try:
            return cls(jobs, await jobs.do(lambda: _connect(path)))
        except sqlite3.Error as error:
            jobs.stop()
            raise StoreUnavailable(f"cannot open the store {path}: {error}") from error
        except BaseException:
            jobs.stop()
            raise

    async def _do(self, job: Callable[[], T]) -> T:
        return await self._jobs.do(job)

    async def all(self, sql: str, *params: Any) -> list[Row]:
        # All rows are fetched even for one: a statement with RETURNING commits only when it is stepped to its end.
        return await self._do(lambda: self._connection.execute(sql, params).fetchall())

    async def run(self, sql: str, *params: Any) -> int:
        return await self._do(lambda: self._connection.execute(sql, params).rowcount)

    async def batch(self, statements: Sequence[Statement]) -> None:
        def job() -> None:
            # IMMEDIATE: a transaction that reads first and then wants to write would fail at once when another wrote.
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for sql, params in statements:
                    self._connection.execute(sql, params).fetchall()
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

        await self._do(job)

    async def time(self) -> float:
        return time.time()  # whoever opens the file is on its machine

    async def close(self) -> None:
        await asyncio.shield(self._do(self._connection.close))
        self._jobs.stop()


class _Jobs:
    """A thread that does one job after another. An executor does the same at more than twice the price a call."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = SimpleQueue()
        Thread(target=self._serve, name="sqlite", daemon=True).start()

    async def do(self, job: Callable[[], T]) -> T:
        """The job's result. It runs to its end even when this caller is cancelled."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put((job, future))
        return await future

    def stop(self) -> None:
        """Ends the thread after the jobs that are queued."""
        self._queue.put(None)

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            job, future = item
            try:
                result, error = _until_free(job), None
            except Exception as raised:  # noqa: BLE001 - it belongs to the caller, who gets it
                result, error = None, raised
            with suppress(RuntimeError):  # the caller's loop is closed: nobody waits any more
                future.get_loop().call_soon_threadsafe(_answer, future, result, error)


def _answer(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return  # cancelled meanwhile
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _connect(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise StoreUnavailable(f"no store at {path}: run `uv run starter.py migrate`")
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, cached_statements=256)
    try:
        connection.execute("PRAGMA journal_mode=WAL").fetchall()
        connection.execute("PRAGMA synchronous=FULL")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _until_free(job: Callable[[], T]) -> T:
    """Runs a job again while another process holds the file: SQLite refuses some locks at once, without waiting.

    One of them is the switch to WAL, in a new file that another process writes to.
    """
    until = time.monotonic() + GIVE_UP_S
    while True:
        try:
            return job()
        except sqlite3.OperationalError as error:
            # The low byte is the primary code, without the extended ones such as SQLITE_BUSY_SNAPSHOT.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(random.uniform(0.005, 0.02))
