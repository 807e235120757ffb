"""Plain SQL over SQLite and Postgres, for the hot path. The schema is SQLAlchemy's (`holdfast.state.schema`).

Both databases are durable at the return of a call (SQLite: WAL with `synchronous=FULL`), and both may be used by
several processes at once.
"""

from __future__ import annotations

import asyncio
import random
import re
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import psycopg
from psycopg_pool import AsyncConnectionPool

Row = tuple[Any, ...]
Statement = tuple[str, Row]
T = TypeVar("T")

BUSY_S = 10.0
"""Seconds that SQLite itself waits for another process's write lock."""
GIVE_UP_S = 30.0
"""Seconds after which a call that still meets a lock fails."""


class StoreUnavailable(Exception):
    """The store cannot be opened or reached. The text is one line and holds no password."""


class Database(ABC):
    """A store. Placeholders are `?` in both dialects, outside quotes and comments; times are epoch seconds, UTC.

    A call is all or nothing, also when its caller is cancelled: it then has happened completely or not at all.
    Errors of the drivers (`sqlite3.Error`, `psycopg.Error`) pass through.
    """

    dialect: Literal["sqlite", "postgresql"]

    @abstractmethod
    async def all(self, sql: str, *params: Any) -> list[Row]:
        """Runs one statement in a transaction of its own; its rows."""

    @abstractmethod
    async def run(self, sql: str, *params: Any) -> int:
        """Runs one statement in a transaction of its own; the number of rows it changed."""

    @abstractmethod
    async def batch(self, statements: Sequence[Statement]) -> None:
        """Runs several `(sql, params)` in one transaction."""

    @abstractmethod
    async def close(self) -> None:
        """Waits for statements that run, then closes. Nothing may be called afterwards."""

    async def one(self, sql: str, *params: Any) -> Row | None:
        """Runs one statement in a transaction of its own; its first row, or None."""
        rows = await self.all(sql, *params)
        return rows[0] if rows else None


async def open_database(url: str) -> Database:
    """Opens `sqlite:///path` (the file has to be there: `holdfast.state.schema.migrate` makes it) or `postgresql://…`.

    Raises StoreUnavailable when it is not there, cannot be reached, or the address is of another kind.
    """
    if (path := sqlite_path(url)) is not None:
        return await Sqlite.open(path)
    return await Postgres.open(url)


def sqlite_path(url: str) -> Path | None:
    """The file of a `sqlite:///` address, None for a Postgres one. Raises StoreUnavailable for any other."""
    scheme = url.partition("://")[0]
    if scheme in ("postgresql", "postgres"):
        return None
    if scheme == "sqlite" and (path := url.removeprefix("sqlite:///")) not in ("", ":memory:", url):
        return Path(path)
    raise StoreUnavailable(
        f"store address of kind {scheme!r}: use sqlite:///<file> or postgresql://<user>@<host>/<database>"
    )


# ------------------------------------------------------------------ SQLite


class Sqlite(Database):
    """One connection in one thread. Calls of one process queue there: SQLite has one writer anyway.

    A job is a whole transaction and runs to its end in the thread whatever becomes of its caller, so a cancelled caller
    leaves no transaction open.
    """

    dialect = "sqlite"

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self._connection = connection
        self._thread = thread

    @classmethod
    async def open(cls, path: Path) -> Sqlite:
        thread = ThreadPoolExecutor(1, "sqlite")
        try:
            connection = await asyncio.get_running_loop().run_in_executor(thread, _until_free, lambda: _connect(path))
        except sqlite3.Error as error:
            raise StoreUnavailable(f"cannot open the store {path}: {error}") from error
        return cls(connection, thread)

    async def _do(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, _until_free, job)

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

    async def close(self) -> None:
        await asyncio.shield(self._do(self._connection.close))
        self._thread.shutdown(wait=False)


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


# ------------------------------------------------------------------ Postgres


class Postgres(Database):
    """A pool of at most 10 connections in autocommit, with prepared statements."""

    dialect = "postgresql"

    def __init__(self, pool: AsyncConnectionPool[Any]) -> None:
        self._pool = pool

    @classmethod
    async def open(cls, url: str) -> Postgres:
        pool = AsyncConnectionPool(
            url, min_size=2, max_size=10, open=False, kwargs={"autocommit": True, "prepare_threshold": 0}
        )
        try:
            # A connection by hand first: the pool would retry in the background and say only that it timed out.
            await (await psycopg.AsyncConnection.connect(url, connect_timeout=5)).close()
            await pool.open(wait=True)
        except psycopg.Error as error:
            await pool.close()
            raise StoreUnavailable(f"cannot reach the Postgres store: {one_line(error)}") from error
        return cls(pool)

    async def all(self, sql: str, *params: Any) -> list[Row]:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_for_psycopg(sql), params, binary=True)
            return await cursor.fetchall() if cursor.description else []

    async def run(self, sql: str, *params: Any) -> int:
        async with self._pool.connection() as connection:
            return (await connection.execute(_for_psycopg(sql), params)).rowcount

    async def batch(self, statements: Sequence[Statement]) -> None:
        async with self._pool.connection() as connection, connection.transaction():
            for sql, params in statements:
                await connection.execute(_for_psycopg(sql), params)

    async def close(self) -> None:
        await self._pool.close()


def one_line(error: BaseException) -> str:
    """An error's text without line breaks, for a message to a person."""
    return " ".join(str(error).split())


_TOKEN = re.compile(r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | --[^\n]* | /\*.*?\*/ | \?""", re.VERBOSE | re.DOTALL)


@lru_cache(maxsize=512)
def _for_psycopg(sql: str) -> bytes:
    """`?` as `%s`, except inside quotes and comments; a literal `%` doubled everywhere, for psycopg looks there too."""
    return _TOKEN.sub(lambda m: "%s" if m[0] == "?" else m[0], sql.replace("%", "%%")).encode()
