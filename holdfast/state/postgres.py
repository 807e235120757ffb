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
"""The server ends a statement at the limit and says why; a connection on which it says nothing is cut so much later."""
ASK_S = 5.0
"""How often a second connection asks whether the server is there, while a migration waits for it."""
LIFE_S = 1800.0
"""Seconds after which a connection is replaced, so that all of them find a server that has moved."""

NETWORK = {
    "connect_timeout": CONNECT_S,
    # The kernel finds out about a peer that is gone within some 20 s, also where no statement waits for it.
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
"""Connection parameters of libpq; those in the store's address win."""

OUT_OF_ORDER = (
    psycopg.OperationalError,  # gone, shutting down, full, a time-out, a deadlock
    psycopg.InterfaceError,  # the connection was cut under the call
    psycopg.errors.ReadOnlySqlTransaction,  # a server that is no primary any more
    psycopg.errors.InsufficientPrivilege,
)

# Its warnings repeat, for each connection, what the call that needs one raises.
logging.getLogger("psycopg.pool").setLevel(logging.ERROR)


class Postgres(Database):
    """A pool of at most 10 connections in autocommit, with prepared statements.

    A statement has a limit at the server. For a server that says nothing at all, the call has a timer that shuts the
    socket: the driver then ends the call as it does when the server hangs up. The pool drops a connection that broke,
    and all the others of that age with it.
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
            # Its pauses double: after a longer outage it would try again only minutes after the database is back.
            reconnect_timeout=CONNECT_S,
        )

    @classmethod
    async def open(cls, url: str, limit_s: float) -> Postgres:
        store: Postgres | None = None
        try:
            url = with_limits(url)
            store = cls(url, limit_s)
            # A connection by hand first: the pool would retry in the background and say only that it timed out.
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
        """Limits at the server. Not with the connection's `options`: poolers such as PgBouncer refuse those."""
        names = ("statement_timeout", "idle_in_transaction_session_timeout")
        # Those that are set for the user, the database or the server win.
        sql = "SELECT set_config(name, %s, false) FROM pg_settings WHERE name = ANY(%s) AND setting = '0'"
        with _cut_after(connection, self._limit_s + GRACE_S):
            await connection.execute(sql, [f"{self._limit_s * 1000:.0f}", list(names)])

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """A connection for one call. Raises StoreUnavailable when there is none, or it does not do its work in time."""
        cut: list[bool] = []
        connection, got_at = None, 0.0
        try:
            async with self._pool.connection() as connection:
                got_at = asyncio.get_running_loop().time()
                with _cut_after(connection, self._limit_s + GRACE_S, cut):
                    yield connection
        except PoolTimeout:
            words = (
                f"no connection came free within {self._limit_s:g} s: all {MOST} are in use, or it cannot be reached"
            )
            raise StoreUnavailable(f"the Postgres store does not answer: {words}") from None
        except OUT_OF_ORDER as error:
            if connection is not None and connection.closed:
                await self._distrust(got_at)
            if cut:
                raise StoreUnavailable(f"the Postgres store did not answer within {self._limit_s:g} s") from None
            raise StoreUnavailable(f"the Postgres store cannot be used now: {one_line(error)}") from error

    async def _distrust(self, since: float) -> None:
        """Replaces the connections that were there at `since`: what broke one of them has broken the others too."""
        if self._fresh_at < since:
            self._fresh_at = asyncio.get_running_loop().time()
            await self._pool.drain()


def with_limits(url: str) -> str:
    """The address with what makes a connection notice that its peer is gone. Raises psycopg.ProgrammingError."""
    return make_conninfo(url, **{k: v for k, v in NETWORK.items() if k not in conninfo_to_dict(url)})


@contextmanager
def _cut_after(
    connection: psycopg.AsyncConnection[Any], seconds: float, cut: list[bool] | None = None
) -> Iterator[None]:
    """Shuts the connection's socket when the block takes longer, and puts True into `cut`.

    Not by a cancellation: the driver would first ask the server, which is silent, to cancel the statement.
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
    """Shuts its socket: a caller that waits for an answer gets the error of a server that hung up."""
    # One of these: it was closed meanwhile, by the peer or by its owner.
    with suppress(OSError, psycopg.OperationalError), socket.socket(fileno=os.dup(connection.fileno())) as copy:
        copy.shutdown(socket.SHUT_RDWR)


class Silence:
    """Whether the server stopped answering."""

    def __init__(self) -> None:
        self.met = False
        self._minded: list[psycopg.Connection[Any]] = []

    def mind(self, connection: psycopg.Connection[Any]) -> None:
        """Shuts this connection when the server stops answering."""
        self._minded.append(connection)

    def hang_up(self) -> None:
        self.met = True
        for each in self._minded:
            _shut(each)


@contextmanager
def noticing_silence(url: str) -> Iterator[Silence]:
    """Ends the wait of blocking connections for a server that is silent.

    A migration may take long, so its statements have no limit. A second connection is made every few seconds instead:
    when it gets no answer in its time, neither will the first.
    """
    silence, done = Silence(), threading.Event()

    def ask() -> None:
        while not done.wait(ASK_S):
            try:
                psycopg.connect(with_limits(url)).close()
            except psycopg.errors.ConnectionTimeout:
                if not done.is_set():
                    silence.hang_up()
                return
            except psycopg.Error:
                continue  # an answer too, or an error that the connection that works gets as well

    threading.Thread(target=ask, name="is the store there", daemon=True).start()
    try:
        yield silence
    finally:
        done.set()


_TOKEN = re.compile(r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | --[^\n]* | /\*.*?\*/ | \?""", re.VERBOSE | re.DOTALL)


@lru_cache(maxsize=512)
def _for_psycopg(sql: str) -> bytes:
    """`?` as `%s`, except inside quotes and comments; a literal `%` doubled everywhere, for psycopg looks there too."""
    return _TOKEN.sub(lambda m: "%s" if m[0] == "?" else m[0], sql.replace("%", "%%")).encode()
