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

from holdfast.state.database import Database, Row, Statement, StoreUnavailable, one_line, storable

T = TypeVar("T")

BUSY_S = 0.1
"""Seconds that SQLite itself waits for another process's lock before the job checks whether its caller still waits."""

OUT_OF_ORDER = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_READONLY,
}
"""Primary result codes that say something about the file or its disk, not about the statement."""


class Sqlite(Database):
    """One connection in one thread. The calls of a process queue there, as SQLite has one writer anyway.

    A job is a whole transaction and runs to its end in the thread even if its caller is cancelled, so no transaction
    stays open. A job whose caller gives up before it begins does not run.
    """

    dialect = "sqlite"

    def __init__(self, path: Path, limit_s: float) -> None:
        self._path = path
        self._jobs = _Jobs(path, limit_s)
        self._connection: sqlite3.Connection

    @classmethod
    async def open(cls, path: Path, limit_s: float) -> Sqlite:
        store = cls(path, limit_s)
        try:
            store._connection = await store._do(lambda: _connect(path))
        except BaseException:
            store._jobs.stop()
            raise
        return store

    async def _do(self, job: Callable[[], T]) -> T:
        return await self._jobs.do(job)

    async def all(self, sql: str, *params: Any) -> list[Row]:
        # Fetches all rows even if the caller needs one: a statement with RETURNING commits only after its last row.
        return await self._do(lambda: self._connection.execute(sql, storable(params)).fetchall())

    async def run(self, sql: str, *params: Any) -> int:
        return await self._do(lambda: self._connection.execute(sql, storable(params)).rowcount)

    async def batch(self, statements: Sequence[Statement]) -> None:
        def job() -> None:
            # IMMEDIATE: a transaction that first reads and then writes would fail at once if another one wrote.
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for sql, params in statements:
                    self._connection.execute(sql, storable(params)).fetchall()
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

        await self._do(job)

    async def time(self) -> float:
        return time.time()  # every process that opens the file runs on the same machine

    async def close(self) -> None:
        await asyncio.shield(self._do(self._connection.close))
        self._jobs.stop()


class _Jobs:
    """A thread that runs one job after another. An executor does the same at more than twice the cost per call."""

    def __init__(self, path: Path, limit_s: float) -> None:
        self._path = path
        self._limit_s = limit_s
        self._queue: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = SimpleQueue()
        Thread(target=self._serve, name="sqlite", daemon=True).start()

    async def do(self, job: Callable[[], T]) -> T:
        """Runs a job and returns its result. A job that has begun runs to its end even if its caller stops waiting.

        Raises StoreUnavailable when the job cannot be done, or is not done within the limit. The limit includes the
        wait for other jobs.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        timer = loop.call_later(self._limit_s, self._too_late, future)
        self._queue.put((job, future))
        try:
            return await future
        except sqlite3.DatabaseError as error:
            if _code(error) not in OUT_OF_ORDER:
                raise
            raise StoreUnavailable(f"cannot use the store {self._path}: {one_line(error)}") from error
        finally:
            timer.cancel()

    def stop(self) -> None:
        """Ends the thread after the queued jobs."""
        self._queue.put(None)

    def _too_late(self, future: asyncio.Future[Any]) -> None:
        words = "another process holds its lock, or the disk is slow"
        error = StoreUnavailable(f"the store {self._path} did not answer within {self._limit_s:g} s: {words}")
        _answer(future, None, error)

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            job, future = item
            if future.done():
                continue
            try:
                result, error = _until_free(job, future.done), None
            except Exception as raised:  # noqa: BLE001 - passed on to the caller
                result, error = None, raised
            with suppress(RuntimeError):  # the caller's loop is closed, so no caller waits for the result
                future.get_loop().call_soon_threadsafe(_answer, future, result, error)


def _answer(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return  # the caller was cancelled or has timed out
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _connect(path: Path) -> sqlite3.Connection:
    try:
        there = path.exists()
    except OSError as error:  # e.g. no permission for the directory
        raise StoreUnavailable(f"cannot use the store {path}: {error.strerror}") from error
    if not there:
        raise StoreUnavailable(f"no store at {path}: run `uv run starter.py migrate`")
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, cached_statements=256)
    try:
        connection.execute("PRAGMA journal_mode=WAL").fetchall()
        connection.execute("PRAGMA synchronous=FULL")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _until_free(job: Callable[[], T], given_up: Callable[[], bool]) -> T:
    """Runs a job, and runs it again while another process locks the file: SQLite refuses some locks without waiting.

    An example is the switch to WAL in a new file that another process writes to.
    """
    while True:
        try:
            return job()
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or given_up():
                raise
        time.sleep(random.uniform(0.005, 0.02))


def _code(error: sqlite3.Error) -> int:
    """Returns the primary result code, also for extended codes such as SQLITE_BUSY_SNAPSHOT."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
