"""The store in Postgres."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool

from holdfast.state.database import Database, Row, Statement, StoreUnavailable, one_line


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

    async def time(self) -> float:
        row = await self.one("SELECT extract(epoch FROM clock_timestamp())::float8")
        assert row is not None
        return row[0]

    async def close(self) -> None:
        await self._pool.close()


_TOKEN = re.compile(r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | --[^\n]* | /\*.*?\*/ | \?""", re.VERBOSE | re.DOTALL)


@lru_cache(maxsize=512)
def _for_psycopg(sql: str) -> bytes:
    """`?` as `%s`, except inside quotes and comments; a literal `%` doubled everywhere, for psycopg looks there too."""
    return _TOKEN.sub(lambda m: "%s" if m[0] == "?" else m[0], sql.replace("%", "%%")).encode()
