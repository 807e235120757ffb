"""Plain SQL over SQLite and Postgres, for the hot path. The schema is SQLAlchemy's (`holdfast.state.schema`).

Both databases are durable at the return of a call (SQLite: WAL with `synchronous=FULL`), and both may be used by
several processes at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from holdfast.contracts import whole

Row = tuple[Any, ...]
Statement = tuple[str, Row]


class StoreUnavailable(Exception):
    """The store cannot be opened, or does not do what it is asked now. The text is one line and holds no password.

    Raised by a call: whether it was done is not known. The same again later is right.
    """


class Database(ABC):
    """A store. Placeholders are `?` in both dialects, outside quotes and comments; times are epoch seconds, UTC.

    A call is all or nothing, also when its caller is cancelled: it then has happened completely or not at all.
    It ends within some seconds (`HOLDFAST_STORE_TIMEOUT_S`): when the store is gone, silent, locked or out of order it
    raises StoreUnavailable. Other errors of the drivers (`sqlite3.Error`, `psycopg.Error`) pass through.
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
    async def time(self) -> float:
        """The store's own clock."""

    @abstractmethod
    async def close(self) -> None:
        """Waits for statements that run, then closes. Nothing may be called afterwards."""

    async def one(self, sql: str, *params: Any) -> Row | None:
        """Runs one statement in a transaction of its own; its first row, or None."""
        rows = await self.all(sql, *params)
        return rows[0] if rows else None


async def open_database(url: str, limit_s: float | None = None) -> Database:
    """Opens `sqlite:///path` (the file has to be there: `holdfast.state.schema.migrate` makes it) or `postgresql://…`.

    limit_s: how long a call may take; without it, what the settings say.
    Raises StoreUnavailable when it is not there, cannot be reached, or the address is of another kind.
    """
    # Imported here: whoever uses one database does not load the other's driver.
    if limit_s is None:
        from holdfast.settings import settings

        limit_s = settings().store_timeout_s
    if (path := sqlite_path(url)) is not None:
        from holdfast.state.sqlite import Sqlite

        return await Sqlite.open(path, limit_s)
    from holdfast.state.postgres import Postgres

    return await Postgres.open(url, limit_s)


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


def storable(params: Row) -> Row:
    """The parameters as either database takes them: no text has a NUL, which Postgres refuses, or half a character."""
    return tuple(whole(each).replace("\0", "\ufffd") if isinstance(each, str) else each for each in params)


def one_line(error: BaseException) -> str:
    """An error's text without line breaks, for a message to a person."""
    return " ".join(str(error).split())
