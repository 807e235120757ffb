"""Migrations: the database they make is the one the code describes, and a wrong version is refused with advice."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from holdfast.state import schema
from holdfast.state.database import Database, StoreUnavailable
from holdfast.state.opening import open_database
from holdfast.state.schema import migrate
from holdfast.state.version import SchemaMismatch, check_schema


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'new' / '100% mine.db'}"
        return
    server = request.getfixturevalue("postgres_server")
    name = f"empty_{uuid4().hex[:12]}"
    yield server.create(name)
    server.drop(name)


def test_the_code_needs_the_newest_migration() -> None:
    assert ScriptDirectory(schema.MIGRATIONS).get_heads() == [schema.VERSION]


def test_the_migrated_database_is_what_the_tables_say(store_url: str) -> None:
    engine = schema.engine(store_url)
    with engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    engine.dispose()


async def test_migrate_from_nothing_then_nothing_to_do(empty_url: str) -> None:
    assert migrate(empty_url) == (None, schema.VERSION)
    assert migrate(empty_url) == (schema.VERSION, schema.VERSION)
    db = await open_database(empty_url)
    await check_schema(db)
    await db.close()


def test_runs_from_before_keys_belonged_to_agents_are_kept(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(schema, "VERSION", "0004")
        assert migrate(empty_url) == (None, "0004")
    engine = schema.engine(empty_url)
    insert = (
        "INSERT INTO runs (request_key, workflow_id, agent, tenant, requested_by, input_digest, trace_id, created_at,"
        " result) VALUES ('k', 'discharge-k', 'discharge', 't', 'r', 'd', 'x', 1.5, '{}')"
    )
    with engine.begin() as connection:
        connection.exec_driver_sql(insert)
    assert migrate(empty_url) == ("0004", schema.VERSION)
    with engine.begin() as connection:
        connection.exec_driver_sql(insert.replace("'discharge", "'billing"))
        rows = connection.exec_driver_sql("SELECT agent, request_key, created_at, result FROM runs ORDER BY agent")
        assert [tuple(row) for row in rows] == [("billing", "k", 1.5, "{}"), ("discharge", "k", 1.5, "{}")]
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        assert inspect(connection).get_pk_constraint("runs")["constrained_columns"] == ["agent", "request_key"]
    engine.dispose()


def test_many_may_migrate_at_once(empty_url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: migrate(empty_url), range(6)))
    assert sorted(before is None for before, _ in found) == [False] * 5 + [True]


def test_a_failing_migration_leaves_nothing(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(connection: Connection) -> None:
        upgrade(connection)
        raise RuntimeError("power cut")

    upgrade = schema.upgrade
    with monkeypatch.context() as patch:
        patch.setattr(schema, "upgrade", break_off)
        with pytest.raises(RuntimeError, match="power cut"):
            migrate(empty_url)
    assert migrate(empty_url) == (None, schema.VERSION)


async def test_a_store_without_schema_says_migrate(db: Database) -> None:
    await db.run("DROP TABLE alembic_version")
    with pytest.raises(SchemaMismatch, match=r"no schema yet: run `uv run starter\.py migrate`"):
        await check_schema(db)


async def test_an_older_store_says_migrate(db: Database) -> None:
    await db.run("UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(SchemaMismatch, match=r"has schema 0000, .* run `uv run starter\.py migrate`"):
        await check_schema(db)


@pytest.mark.parametrize("found", ["0999", "1001"])
async def test_a_newer_store_is_never_migrated(db: Database, store_url: str, found: str) -> None:
    await db.run("UPDATE alembic_version SET version_num = ?", found)
    with pytest.raises(SchemaMismatch, match=rf"older than the store .*{found}.*: deploy the newer version"):
        migrate(store_url)
    assert await db.one("SELECT version_num FROM alembic_version") == (found,)


async def test_an_old_build_starts_on_a_newer_store_of_its_generation_only(db: Database) -> None:
    await db.run("UPDATE alembic_version SET version_num = '0999'")
    await check_schema(db)
    await db.run("UPDATE alembic_version SET version_num = '1001'")
    with pytest.raises(SchemaMismatch, match=r"older than the store .*1001.*: deploy the newer version"):
        await check_schema(db)


def test_no_server_is_one_clear_line() -> None:
    with pytest.raises(StoreUnavailable) as error:
        migrate("postgresql://me:hunter2@127.0.0.1:1/x")
    assert "cannot migrate the store" in str(error.value)
    assert "\n" not in str(error.value) and "hunter2" not in str(error.value)
