"""The tables of the store, and its migration. Times are epoch seconds, UTC; JSON is text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import (
    URL,
    Column,
    Connection,
    Double,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from holdfast.state.database import StoreUnavailable, one_line, sqlite_path
from holdfast.state.version import VERSION, refuse_newer

MIGRATIONS = Path(__file__).parent / "migrations"

metadata = MetaData()

runs = Table(
    "runs",
    metadata,
    Column("request_key", Text, nullable=False),
    Column("workflow_id", Text, nullable=False),
    Column("agent", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("requested_by", Text, nullable=False),
    Column("input_digest", Text, nullable=False),
    Column("trace_id", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("outcome", Text),
    Column("result", Text),
    Column("ended_at", Double),
    Column("namespace", Text),
    PrimaryKeyConstraint("agent", "request_key"),
    UniqueConstraint("workflow_id", name="runs_workflow_id_key"),
)
"""One row per request, by agent and request key. Kept for good, as Temporal deletes a run after its retention."""

effects = Table(
    "effects",
    metadata,
    Column("key", Text, primary_key=True),
    Column("key_base", Text, nullable=False),
    Column("seq", Integer),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("service", Text, nullable=False),
    Column("effect", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("prior", Text),
    Column("attempt", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("worker", Text, nullable=False),
    Column("arguments", Text, nullable=False),
    Column("result", Text),
    Column("error", Text),
    Column("reserved_at", Double, nullable=False),
    Column("settled_at", Double),
    Column("agent", Text),
    Column("log", Text),
    Column("position", Text),
    Index("effects_key_base", "key_base"),
)
"""The effect ledger: one row per idempotency key. `log` has a JSON line for each attempt that failed."""

breakers = Table(
    "breakers",
    metadata,
    Column("target", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("window_at", Double, nullable=False),
    Column("window_calls", Integer, nullable=False),
    Column("window_failures", Integer, nullable=False),
    Column("opened_at", Double),
    Column("probe_at", Double),
    Column("prober", Text),
    Column("lease_until", Double, nullable=False),
    Column("paused_until", Double, nullable=False),
    Column("held", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("changed_at", Double, nullable=False),
)
"""Circuit breakers: one row per target that ever failed; no row means closed. `held`: tripped and reset by hand."""

limits = Table(
    "limits",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("book", Text, nullable=False),
)
"""One row per rate limit: the calls of the last minute and those booked ahead. Also the places of calls in flight."""

last_good = Table(
    "last_good",
    metadata,
    Column("tool", Text, primary_key=True),
    Column("tenant", Text, primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("result", Text, nullable=False),
    Column("at", Double, nullable=False),
)
"""The last good results of reads that can fall back on them."""

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("agent", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("workflow_id", Text, nullable=False),
    Column("key_base", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("cause", Text, nullable=False),
    Column("context", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("closed_at", Double),
    Column("note", Text, nullable=False),
    Index("dead_letters_state", "state", "created_at"),
    Index("dead_letters_workflow", "workflow_id"),
)
"""Dead letters: what could not be processed, with its full context, until it is replayed, settled or dropped."""

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("thread_id", Text, primary_key=True),
    Column("checkpoint_ns", Text, primary_key=True),
    Column("checkpoint_id", Text, primary_key=True),
    Column("parent_id", Text),
    Column("turn", Text),
    Column("kind", Text, nullable=False),
    Column("checkpoint", LargeBinary, nullable=False),
    Column("metadata", Text, nullable=False),
    Index("checkpoints_turn", "thread_id", "turn"),
)
"""LangGraph's checkpoints, each complete. `kind` is the encoding of `checkpoint`; `turn` repeats metadata's `turn`."""

checkpoint_writes = Table(
    "checkpoint_writes",
    metadata,
    Column("thread_id", Text, primary_key=True),
    Column("checkpoint_ns", Text, primary_key=True),
    Column("checkpoint_id", Text, primary_key=True),
    Column("task_id", Text, primary_key=True),
    Column("idx", Integer, primary_key=True),
    Column("channel", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("value", LargeBinary, nullable=False),
    Column("task_path", Text, nullable=False),
)
"""The writes of finished tasks in an unfinished superstep, so that a resumed graph does not run them again."""

claims = Table(
    "claims",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("namespace", Text, primary_key=True),
    Column("payload", LargeBinary, nullable=False),
    Column("at", Double, nullable=False),
    Index("claims_at", "namespace", "at"),
)
"""Payload storage: payloads too large for Temporal's history, by the SHA-256 of the stored bytes.

`at`: when the payload was last stored."""


def migrate(url: str) -> tuple[str | None, str]:
    """Migrates the store to the schema of this code, and creates an SQLite file if there is none. Blocks.

    Returns the versions (before, after); `before` is None for a new store. Several processes may call it at once: one
    migrates in one transaction, the others wait for it.
    Raises StoreUnavailable when the store cannot be reached, SchemaMismatch when it is newer than the code.
    """
    try:
        connector = engine(url)
    except (OSError, SQLAlchemyError, ValueError) as error:
        raise StoreUnavailable(f"cannot migrate the store: {one_line(error)}") from error
    try:
        with _requiring_answers(connector, url), connector.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SET LOCAL lock_timeout = '30s'")
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('holdfast.migrate'))")
            before = current_version(connection)
            if before is not None:
                refuse_newer(before)
            if before != VERSION:
                upgrade(connection)
    except DBAPIError as error:
        raise StoreUnavailable(f"cannot migrate the store: {one_line(error.orig or error)}") from error
    finally:
        connector.dispose()
    return before, VERSION


@contextmanager
def _requiring_answers(connector: Engine, url: str) -> Iterator[None]:
    """Raises StoreUnavailable if a Postgres server stops answering during the block."""
    if connector.dialect.name != "postgresql":
        yield
        return
    from holdfast.state.postgres import watching_for_silence

    with watching_for_silence(url) as silence:
        # Inserted before SQLAlchemy's own listener, which already queries the server.
        event.listen(connector, "connect", lambda made, _: silence.watch(made), insert=True)
        try:
            yield
        except DBAPIError:
            if not silence.silent:
                raise
            raise StoreUnavailable(
                "cannot migrate the store: Postgres stopped answering; a migration is applied completely or not at "
                "all: run it again when the server answers"
            ) from None


def upgrade(connection: Connection) -> None:
    """Runs the missing migrations in the connection's transaction."""
    # Imported here, as workers only check the schema at start and never migrate.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, VERSION)


def current_version(connection: Connection) -> str | None:
    from alembic.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision()


def engine(url: str) -> Engine:
    """Returns a synchronous SQLAlchemy engine for migrations and admin queries, without a pool."""
    path = sqlite_path(url)
    if path is None:
        from holdfast.state.postgres import NETWORK

        address = make_url(url).set(drivername="postgresql+psycopg")
        mine = {name: value for name, value in NETWORK.items() if name not in address.query}
        return create_engine(address, poolclass=NullPool, connect_args=mine)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"timeout": 30.0, "isolation_level": None}
    made = create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool, connect_args=options)
    # The driver's own BEGIN would leave schema changes outside the transaction and take the write lock late.
    event.listen(made, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return made
