"""The store in Postgres."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import lru_cache
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from holdfast.state.database import Database, Row, Statement, StoreUnavailable, one_line, storable

CONNECT_S = 5
"""Seconds for a new connection."""
MOST = 10
GRACE_S = 1.0
"""Seconds. At the limit the server ends a statement with an error; without one, the connection is cut this much later.
"""
ASK_S = 5.0
"""Seconds between two checks, over a second connection, that the server answers during a migration."""
LIFE_S = 1800.0
"""Seconds after which a connection is replaced, so that all connections find a server that has moved."""

NETWORK = {
    "connect_timeout": CONNECT_S,
    # The kernel detects within some 20 s that the peer is gone, also on a connection without a statement.
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
"""Connection parameters of libpq. Parameters in the store's address take precedence."""

OUT_OF_ORDER = (
    psycopg.OperationalError,  # down, shutting down, full, a timeout, a deadlock
    psycopg.InterfaceError,  # the connection was cut during the call
    psycopg.errors.ReadOnlySqlTransaction,  # the server is no longer the primary
    psycopg.errors.InsufficientPrivilege,
)

# The pool logs for each connection what the call that needs one raises anyway.
logging.getLogger("psycopg.pool").setLevel(logging.ERROR)


class Postgres(Database):
    """A pool of at most 10 connections in autocommit, with prepared statements.

    Statements have a time limit at the server. If the server does not answer at all, a timer shuts the socket, and the
    driver ends the call as if the server had closed the connection. When a connection breaks, the pool drops it and all
    others of that age.
    """

    dialect = "postgresql"

    def __init__(self, url: str, limit_s: float) -> None:
        self._limit_s = limit_s
        self._fresh_at = float("-inf")
        self._pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
            url,
            min_size=2,
            max_size=MOST,
            open=False,
            kwargs={"autocommit": True, "prepare_threshold": 0},
            configure=self._configure,
            timeout=limit_s,
            max_lifetime=LIFE_S,
            # The pool's pauses double. A longer value would let it reconnect minutes after the database is back.
            reconnect_timeout=CONNECT_S,
        )

    @classmethod
    async def open(cls, url: str, limit_s: float) -> Postgres:
        store: Postgres | None = None
        try:
            url = with_limits(url)
            store = cls(url, limit_s)
            # First a connection without the pool, which would retry in the background and report only a timeout.
            await (await psycopg.AsyncConnection.connect(url)).close()
            await store._pool.open(wait=True, timeout=limit_s)
        except (psycopg.Error, ValueError) as error:
            if store is not None:
                await store._pool.close()
            raise StoreUnavailable(f"cannot reach the Postgres store: {one_line(error)}") from error
        return store

    async def all(self, sql: str, *params: Any) -> list[Row]:
        async with self._connection() as connection:
            cursor = await connection.execute(_for_psycopg(sql), storable(params), binary=True)
            return await cursor.fetchall() if cursor.description else []

    async def run(self, sql: str, *params: Any) -> int:
        async with self._connection() as connection:
            return (await connection.execute(_for_psycopg(sql), storable(params))).rowcount

    async def batch(self, statements: Sequence[Statement]) -> None:
        async with self._connection() as connection, connection.transaction():
            for sql, params in statements:
                await connection.execute(_for_psycopg(sql), storable(params))

    async def time(self) -> float:
        row = await self.one("SELECT extract(epoch FROM clock_timestamp())::float8")
        assert row is not None
        return row[0]

    async def close(self) -> None:
        await self._pool.close()

    async def _configure(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Sets the limits at the server. Not in the connection's `options`, which poolers such as PgBouncer refuse."""
        names = ("statement_timeout", "idle_in_transaction_session_timeout")
        # Limits that are set for the user, the database or the server take precedence.
        sql = "SELECT set_config(name, %s, false) FROM pg_settings WHERE name = ANY(%s) AND setting = '0'"
        with _cut_after(connection, self._limit_s + GRACE_S):
            await connection.execute(sql, [f"{self._limit_s * 1000:.0f}", list(names)])

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Lends a connection for one call. Raises StoreUnavailable when none is free, or the call takes too long."""
        cut: list[bool] = []
        connection, got_at = None, 0.0
        try:
            async with self._pool.connection() as connection:
                got_at = asyncio.get_running_loop().time()
                with _cut_after(connection, self._limit_s + GRACE_S, cut):
                    yield connection
        except PoolTimeout:
            words = f"no connection came free within {self._limit_s:g} s: all {MOST} are in use, or the server is down"
            raise StoreUnavailable(f"the Postgres store does not answer: {words}") from None
        except OUT_OF_ORDER as error:
            if connection is not None and connection.closed:
                await self._distrust(got_at)
            if cut:
                raise StoreUnavailable(f"the Postgres store did not answer within {self._limit_s:g} s") from None
            raise StoreUnavailable(f"the Postgres store cannot be used now: {one_line(error)}") from error

    async def _distrust(self, since: float) -> None:
        """Replaces the connections that existed at `since`: what broke one of them has probably broken the others."""
        if self._fresh_at < since:
            self._fresh_at = asyncio.get_running_loop().time()
            await self._pool.drain()


def with_limits(url: str) -> str:
    """Adds the parameters in `NETWORK` to the address. Raises psycopg.ProgrammingError for an invalid address."""
    return make_conninfo(url, **{k: v for k, v in NETWORK.items() if k not in conninfo_to_dict(url)})


@contextmanager
def _cut_after(
    connection: psycopg.AsyncConnection[Any], seconds: float, cut: list[bool] | None = None
) -> Iterator[None]:
    """Shuts the connection's socket if the block takes longer than `seconds`, and appends True to `cut`.

    It does not cancel the task: the driver would first ask the server, which does not answer, to cancel the statement.
    """

    def shut() -> None:
        if cut is not None:
            cut.append(True)
        _shut(connection)

    timer = asyncio.get_running_loop().call_later(seconds, shut)
    try:
        yield
    finally:
        timer.cancel()


def _shut(connection: psycopg.AsyncConnection[Any] | psycopg.Connection[Any]) -> None:
    """Shuts the socket: a caller that waits for an answer gets the same error as when the server closes it."""
    # These errors mean that the peer or the owner has closed the connection in the meantime.
    with suppress(OSError, psycopg.OperationalError), socket.socket(fileno=os.dup(connection.fileno())) as copy:
        copy.shutdown(socket.SHUT_RDWR)


class SilenceWatch:
    """Shuts the watched connections when the server stops answering."""

    def __init__(self) -> None:
        self.silent = False
        self._watched: list[psycopg.Connection[Any]] = []

    def watch(self, connection: psycopg.Connection[Any]) -> None:
        """Adds a connection to shut when the server stops answering."""
        self._watched.append(connection)

    def hang_up(self) -> None:
        self.silent = True
        for each in self._watched:
            _shut(each)


@contextmanager
def watching_for_silence(url: str) -> Iterator[SilenceWatch]:
    """Ends calls on blocking connections when the server stops answering.

    A migration can take long, so its statements have no limit. Instead, a thread opens a second connection every few
    seconds. If that one gets no answer within its timeout, the server will not answer the watched connections either.
    """
    silence, done = SilenceWatch(), threading.Event()

    def ask() -> None:
        while not done.wait(ASK_S):
            try:
                psycopg.connect(with_limits(url)).close()
            except psycopg.errors.ConnectionTimeout:
                if not done.is_set():
                    silence.hang_up()
                return
            except psycopg.Error:
                continue  # the server answered, or the watched connections get the same error

    threading.Thread(target=ask, name="is the store there", daemon=True).start()
    try:
        yield silence
    finally:
        done.set()


_TOKEN = re.compile(r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | --[^\n]* | /\*.*?\*/ | \?""", re.VERBOSE | re.DOTALL)


@lru_cache(maxsize=512)
def _for_psycopg(sql: str) -> bytes:
    """Turns `?` into `%s`, except in quotes and comments, and doubles `%` everywhere, as psycopg reads it there too."""
    return _TOKEN.sub(lambda m: "%s" if m[0] == "?" else m[0], sql.replace("%", "%%")).encode()
