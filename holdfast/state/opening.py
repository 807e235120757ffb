"""Opening the store by its address."""

from __future__ import annotations

from holdfast.settings import settings
from holdfast.state.database import Database, sqlite_path


async def open_database(url: str, limit_s: float | None = None) -> Database:
    """Opens `sqlite:///path` or `postgresql://…`. The SQLite file has to exist; `schema.migrate` creates it.

    limit_s: how long a call may take, in seconds; None: as in the settings.
    Raises StoreUnavailable when the store does not exist, cannot be reached, or the address is of another kind.
    """
    if limit_s is None:
        limit_s = settings().store_timeout_s
    # Imported here, so that a process does not load the driver of the database that it does not use.
    if (path := sqlite_path(url)) is not None:
        from holdfast.state.sqlite import Sqlite

        return await Sqlite.open(path, limit_s)
    from holdfast.state.postgres import Postgres

    return await Postgres.open(url, limit_s)
