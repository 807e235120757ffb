"""The schema version that this code needs, and the check of a store. Every start runs it, so it avoids SQLAlchemy."""

from __future__ import annotations

from holdfast.state.database import Database

VERSION = "0005"
"""The migration that this code needs: the newest in `migrations/versions`. Migrations are numbered in order.

The first digit is the generation. Within a generation, a migration only adds what older code does not need: workers of
an old build have to start on the new schema, as their pinned runs may take a month to end. A migration that older code
cannot work with begins the next generation (`1001_…`). Apply it only when no old build is left.
"""


class SchemaMismatch(Exception):
    """The store's schema is not the one that this code needs. The message is one line that says what to do."""


async def check_schema(db: Database) -> None:
    """Raises SchemaMismatch unless the store has the schema of this code, or a later one of its generation."""
    found = await _version(db)
    if found is None:
        raise SchemaMismatch("the store has no schema yet: run `uv run starter.py migrate`")
    if found < VERSION:
        raise SchemaMismatch(
            f"the store has schema {found}, this code needs {VERSION}: run `uv run starter.py migrate`"
        )
    if found[0] > VERSION[0]:
        refuse_newer(found)


def refuse_newer(found: str) -> None:
    """Raises SchemaMismatch for a store that is newer than this code, which does not know its migrations."""
    if found > VERSION:
        raise SchemaMismatch(
            f"this code is older than the store (schema {VERSION} < {found}): deploy the newer version"
        )


async def _version(db: Database) -> str | None:
    tables = {
        "sqlite": "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'alembic_version'",
        "postgresql": "SELECT 1 WHERE to_regclass('alembic_version') IS NOT NULL",
    }
    if await db.one(tables[db.dialect]) is None:
        return None
    row = await db.one("SELECT version_num FROM alembic_version")
    return row[0] if row else None
