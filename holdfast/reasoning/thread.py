"""One turn's view of a run's thread of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    copy_checkpoint,
)

from holdfast.contracts.data import Json
from holdfast.reasoning.checkpointer import Checkpoints
from holdfast.state.database import Database

MAX_SUPERSTEPS = 200
"""Most supersteps of a turn. A graph that needs more is in an endless loop."""
ERROR, HANDLED = "__error__", "__error_source_node__"


class Forgotten(Exception):
    """The store lacks a checkpoint that the history names: the store was restored to an earlier time."""


class Thread(Checkpoints):
    """The thread up to `head`: the turn's own newest checkpoint, else the checkpoint that the turn goes on from.

    It hides later checkpoints of other attempts: a frozen worker that wakes up may have moved the thread's end.

    It stores everything that LangGraph passes to it, so that finished branches and open interrupts survive a crash.
    When `lean`, it stores the checkpoint with the turn's decision and nothing else: anything before that only saves
    running nodes again, and a repeated node repeats no model call, because the ledger has the answer. Lean is for
    graphs whose nodes do nothing but ask the model.
    """

    def __init__(self, db: Database, thread_id: str, tag: str, base: str | None, *, lean: bool = False) -> None:
        super().__init__(db)
        self._id = thread_id
        self._tag = tag
        self._base = base
        self._lean = lean
        self._head: CheckpointTuple | None = None
        self.head = ""
        """Id of the thread's last checkpoint; empty for an empty thread."""
        self.carried: Json = {}
        """Small JSON data of the platform, stored with every checkpoint from here on and loaded with it."""
        self.config: RunnableConfig = {
            "configurable": {"thread_id": thread_id},
            "metadata": {"turn": tag},
            "recursion_limit": MAX_SUPERSTEPS,
        }

    async def open(self) -> bool:
        """Finds the head. Returns True when an earlier attempt of this turn stored it. Raises Forgotten."""
        found = await self.newest(self._id, self._tag, self._base)
        if found is None:
            if self._base:
                # With an empty conversation the run would do all its work again, under new keys.
                raise Forgotten(
                    f"the store lacks checkpoint {self._base} of this run: was it restored older than Temporal?"
                    " The run waits until the checkpoint is back: see docs/how-to/backup.md"
                )
            return False
        self._head, self.head = found, found.config.get("configurable", {})["checkpoint_id"]
        self.carried = found.metadata.get("carried", {})  # type: ignore[typeddict-item]
        return _of(found) == self._tag

    def value(self, channel: str, default: Any) -> Any:
        """Returns the channel's value at the head when the thread was opened."""
        return self._head.checkpoint["channel_values"].get(channel, default) if self._head else default

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        if _nested(config):
            return await super().aget_tuple(config)
        # A copy, because LangGraph applies pending writes to it.
        return self._head and self._head._replace(checkpoint=copy_checkpoint(self._head.checkpoint))

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        if _nested(config):
            return await super().aput(config, checkpoint, metadata, new_versions)
        if _decided(checkpoint) or not self._lean:
            parent: RunnableConfig = {**config, "configurable": {"thread_id": self._id, "checkpoint_id": self.head}}
            stored: Any = {**metadata, "carried": self.carried} if self.carried else metadata
            await super().aput(parent, checkpoint, stored, new_versions)
            self.head = checkpoint["id"]
        return {"configurable": {"thread_id": self._id, "checkpoint_ns": "", "checkpoint_id": checkpoint["id"]}}

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        channels = {channel for channel, _ in writes}
        # A failed node runs again. The next attempt does not need its error, which may hold data that must not be kept.
        failed = ERROR in channels and HANDLED not in channels
        if not failed and (_nested(config) or not self._lean):
            await super().aput_writes(config, writes, task_id, task_path)


def _of(found: CheckpointTuple) -> str:
    """Returns the tag of the turn that stored a checkpoint."""
    return found.metadata.get("turn", "")


def _decided(checkpoint: Checkpoint) -> bool:
    return checkpoint["channel_values"].get("decision") is not None


def _nested(config: RunnableConfig) -> bool:
    """Whether this is a subgraph's thread, which has no turns."""
    return bool(config.get("configurable", {}).get("checkpoint_ns"))
