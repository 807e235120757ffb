"""Plain SQL over SQLite and Postgres, for the hot path. SQLAlchemy defines the schema (`holdfast.state.schema`).

With both databases, a change is durable when the call returns (SQLite: WAL with `synchronous=FULL`), and several
processes can use the store at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from holdfast.contracts.data import whole

Row = tuple[Any, ...]
Statement = tuple[str, Row]


class StoreUnavailable(Exception):
    """The store cannot be opened, or cannot execute a call now. The message is one line and contains no password.

    When a call raises it, it is not known whether the call took effect. Make the same call again later.
    """


class Database(ABC):
    """A store. Placeholders are `?` in both dialects, outside quotes and comments; times are epoch seconds, UTC.

    A call takes effect completely or not at all, also when its caller is cancelled.
    It ends within some seconds (`HOLDFAST_STORE_TIMEOUT_S`): when the store is down, silent, locked or broken, it
    raises StoreUnavailable. Other errors of the drivers (`sqlite3.Error`, `psycopg.Error`) pass through.
    """

    dialect: Literal["sqlite", "postgresql"]

    @abstractmethod
    async def all(self, sql: str, *params: Any) -> list[Row]:
        """Runs one statement in its own transaction and returns its rows."""

    @abstractmethod
    async def run(self, sql: str, *params: Any) -> int:
        """Runs one statement in its own transaction and returns the number of rows it changed."""

    @abstractmethod
    async def batch(self, statements: Sequence[Statement]) -> None:
        """Runs several `(sql, params)` in one transaction."""

    @abstractmethod
    async def time(self) -> float:
        """Returns the time of the store's own clock, in epoch seconds."""

    @abstractmethod
    async def close(self) -> None:
        """Waits for running statements, then closes the store. Call no method afterwards."""

    async def one(self, sql: str, *params: Any) -> Row | None:
        """Runs one statement in its own transaction and returns its first row, or None."""
        rows = await self.all(sql, *params)
        return rows[0] if rows else None


def sqlite_path(url: str) -> Path | None:
    """Returns the file of a `sqlite:///` address, None for a Postgres one. Raises StoreUnavailable for any other."""
    scheme = url.partition("://")[0]
    if scheme in ("postgresql", "postgres"):
        return None
    if scheme == "sqlite" and (path := url.removeprefix("sqlite:///")) not in ("", ":memory:", url):
        return Path(path)
    raise StoreUnavailable(
        f"store address of kind {scheme!r}: use sqlite:///<file> or postgresql://<user>@<host>/<database>"
    )


def storable(params: Row) -> Row:
    """Makes parameters storable in both databases: replaces NUL, which Postgres refuses, and unpaired surrogates."""
    return tuple(whole(each).replace("\0", "\ufffd") if isinstance(each, str) else each for each in params)


def one_line(error: BaseException) -> str:
    """Returns an error's text without line breaks, for a one-line message."""
    return " ".join(str(error).split())
