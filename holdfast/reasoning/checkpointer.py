"""Stores LangGraph's checkpoints in the store.

LangGraph's own savers are about as fast (docs/explanation/benchmark.md). They have no index by which a retry finds the
checkpoints of its turn, and no limit for a store that is silent. Here a step costs one statement for its writes and one
for its checkpoint, over the connections that the ledger uses.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, NoReturn

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    PendingWrite,
    get_serializable_checkpoint_metadata,
    writes_sort_key,
)

from holdfast.state.database import Database, Row

GET = (
    "SELECT checkpoint_id, parent_id, kind, checkpoint, metadata, EXISTS (SELECT 1 FROM checkpoint_writes w"
    " WHERE w.thread_id = c.thread_id AND w.checkpoint_ns = c.checkpoint_ns AND w.checkpoint_id = c.checkpoint_id)"
    " FROM checkpoints c WHERE thread_id = ? AND checkpoint_ns = ?"
)
PUT = (
    "INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_id, turn, kind, checkpoint, metadata)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id) DO UPDATE SET"
    " parent_id = excluded.parent_id, turn = excluded.turn, kind = excluded.kind, checkpoint = excluded.checkpoint,"
    " metadata = excluded.metadata"
)
WRITES_A_STATEMENT = 500
"""Rows per statement: databases limit a statement's parameters (SQLite: 32,766)."""


class Unstorable(Exception):
    """A graph's state, or a value that it passes to `interrupt()`, cannot be stored."""


class Checkpoints(BaseCheckpointSaver[int]):
    """A checkpointer over `Database`. Asynchronous only; one instance serves any number of threads and tasks at once.

    It keeps every checkpoint, complete in one row, so that a run can be forked from any of them. It stores all pending
    writes: after a crash, a superstep of parallel nodes repeats only the nodes that had not finished.
    The metadata entry `turn` has an index: `alist(config, filter={"turn": 7})` reads only that turn's checkpoints.
    """

    def __init__(self, db: Database) -> None:
        super().__init__()
        self._db = db

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Returns the checkpoint that `config` names by `checkpoint_id`, else the thread's latest, else None."""
        thread_id, ns, checkpoint_id = _names(config)
        if checkpoint_id:
            row = await self._db.one(f"{GET} AND checkpoint_id = ?", thread_id, ns, checkpoint_id)
        else:
            row = await self._db.one(f"{GET} ORDER BY checkpoint_id DESC LIMIT 1", thread_id, ns)
        return await self._tuple(thread_id, ns, row)

    async def newest(self, thread_id: str, turn: str, base: str | None) -> CheckpointTuple | None:
        """Returns the newest checkpoint of a turn, else the one with the id `base`, else None."""
        row = await self._db.one(
            f"{GET} AND (turn = ? OR checkpoint_id = ?)"
            " ORDER BY CASE WHEN turn = ? THEN 1 ELSE 0 END DESC, checkpoint_id DESC LIMIT 1",
            *(thread_id, "", turn, base or "", turn),
        )
        return await self._tuple(thread_id, "", row)

    async def _tuple(self, thread_id: str, ns: str, row: Row | None) -> CheckpointTuple | None:
        if row is None:
            return None
        checkpoint_id, parent_id, kind, body, metadata, has_writes = row
        return CheckpointTuple(
            config=_config(thread_id, ns, checkpoint_id),
            checkpoint=self.serde.loads_typed((kind, body)),
            metadata=json.loads(metadata),
            parent_config=_config(thread_id, ns, parent_id) if parent_id else None,
            pending_writes=await self._writes(thread_id, ns, checkpoint_id) if has_writes else [],
        )

    async def _writes(self, thread_id: str, ns: str, checkpoint_id: str) -> list[PendingWrite]:
        rows = await self._db.all(
            "SELECT task_path, task_id, idx, channel, kind, value FROM checkpoint_writes"
            " WHERE thread_id = ? AND checkpoint_ns = ? AND checkpoint_id = ?",
            *(thread_id, ns, checkpoint_id),
        )
        # Sorted here and not in SQL: the order must be that of Python strings, and a database's collation may differ.
        rows.sort(key=lambda row: writes_sort_key(*row[:3]))
        load = self.serde.loads_typed
        return [(task_id, channel, load((kind, value))) for _, task_id, _, channel, kind, value in rows]

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """Yields checkpoints, newest first: those of the thread, namespace and id that `config` names, or all.

        filter: values that the metadata must have. before: yields only checkpoints older than this config's.
        """
        where: dict[str, Any] = {}
        if config is not None:
            names = config.get("configurable", {})
            where = {f"{name} = ?": str(names[name]) for name in ("thread_id", "checkpoint_ns") if name in names}
            if names.get("checkpoint_id"):
                where["checkpoint_id = ?"] = names["checkpoint_id"]
        if before is not None and (newest := _names(before)[2]):
            where["checkpoint_id < ?"] = newest
        if filter and "turn" in filter:
            where["turn = ?"] = str(filter["turn"])
        condition = f" WHERE {' AND '.join(where)}" if where else ""
        # Names and metadata first: checkpoints are large, and the caller may stop after any of them.
        rows = await self._db.all(
            f"SELECT thread_id, checkpoint_ns, checkpoint_id, metadata FROM checkpoints{condition}"
            " ORDER BY checkpoint_id DESC",
            *where.values(),
        )
        matching = [row[:3] for row in rows if _matches(json.loads(row[3]), filter or {})]
        for names in matching[:limit]:
            if found := await self.aget_tuple(_config(*names)):
                yield found

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Stores a checkpoint as a child of the one that `config` names. It is durable on return."""
        thread_id, ns, parent_id = _names(config)
        stored = dict(get_serializable_checkpoint_metadata(config, metadata))
        turn = str(stored["turn"]) if "turn" in stored else None
        kind, body = self._dump(checkpoint)
        await self._db.run(PUT, thread_id, ns, checkpoint["id"], parent_id, turn, kind, body, json.dumps(stored))
        return _config(thread_id, ns, checkpoint["id"])

    async def aput_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Stores atomically all writes of one task in the superstep after `config`'s checkpoint."""
        thread_id, ns, checkpoint_id = _names(config)
        # Special channels (errors, interrupts) have one slot each, below zero; there the last write counts.
        by_idx = {WRITES_IDX_MAP.get(channel, n): (channel, value) for n, (channel, value) in enumerate(writes)}
        rows = [
            (thread_id, ns, checkpoint_id, task_id, idx, channel, *self._dump(value), task_path)
            for idx, (channel, value) in by_idx.items()
        ]
        statements = [
            _put_writes(rows[start : start + WRITES_A_STATEMENT]) for start in range(0, len(rows), WRITES_A_STATEMENT)
        ]
        if len(statements) == 1:
            sql, params = statements[0]
            await self._db.run(sql, *params)
        else:
            await self._db.batch(statements)

    def _dump(self, value: Any) -> tuple[str, bytes]:
        try:
            return self.serde.dumps_typed(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise Unstorable(
                f"a graph's state or interrupt() value cannot be stored: {error}; keep plain data such as JSON"
            ) from None

    async def adelete_thread(self, thread_id: str) -> None:
        await self._db.batch(
            [
                ("DELETE FROM checkpoint_writes WHERE thread_id = ?", (thread_id,)),
                ("DELETE FROM checkpoints WHERE thread_id = ?", (thread_id,)),
            ]
        )

    def _only_async(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("Checkpoints is asynchronous: call the graph with ainvoke, astream or aget_state")

    get_tuple = list = put = put_writes = delete_thread = _only_async


def _names(config: RunnableConfig) -> tuple[str, str, str | None]:
    """Returns thread id, namespace and checkpoint id of a config."""
    names = config.get("configurable", {})
    return str(names["thread_id"]), names.get("checkpoint_ns", ""), names.get("checkpoint_id")


def _config(thread_id: str, ns: str, checkpoint_id: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}}


def _matches(metadata: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(metadata.get(name) == value for name, value in wanted.items())


def _put_writes(rows: Sequence[Row]) -> tuple[str, Row]:
    """Builds one statement for all rows. A repeated task keeps its first ordinary writes, as LangGraph requires."""
    sql = (
        "INSERT INTO checkpoint_writes"
        " (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, channel, kind, value, task_path)"
        f" VALUES {', '.join(['(?, ?, ?, ?, ?, ?, ?, ?, ?)'] * len(rows))}"
        " ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, idx) DO UPDATE SET"
        " channel = excluded.channel, kind = excluded.kind, value = excluded.value WHERE excluded.idx < 0"
    )
    return sql, tuple(value for row in rows for value in row)
