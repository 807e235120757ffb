"""A run's thread of checkpoints as one turn sees it."""

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

from holdfast.contracts import Json
from holdfast.state.checkpoints import Checkpoints
from holdfast.state.database import Database

MAX_SUPERSTEPS = 200
"""Of a turn. A graph that needs more goes round in circles."""
ERROR, HANDLED = "__error__", "__error_source_node__"


class Forgotten(Exception):
    """The store lacks the checkpoint that history says is there: it was restored to an earlier moment."""


class Thread(Checkpoints):
    """The thread up to `head`: what the turn has already stored, else the checkpoint that it goes on from.

    What another attempt has put after it is not there: a frozen worker that wakes may have moved the thread's end.

    Stores all that LangGraph gives, so that what branches have finished and what an interrupt waits for survive; or,
    when `lean`, a checkpoint for each node that is done, and no more. What LangGraph puts before the first node and
    ahead of a node's checkpoint saves only that the node runs again, and a repeated node repeats no model call: the
    ledger has it. Lean is for a graph of one line of nodes.
    """

    def __init__(self, db: Database, thread_id: str, tag: str, base: str | None, *, lean: bool = False) -> None:
        super().__init__(db)
        self._id = thread_id
        self._tag = tag
        self._base = base
        self._lean = lean
        self._head: CheckpointTuple | None = None
        self._unstored = 0
        self.head = ""
        """Id of the checkpoint that the thread ends with; empty for an empty thread."""
        self.carried: Json = {}
        """Small JSON data of the platform's own: goes with every checkpoint from here on, and comes back with it."""
        self.config: RunnableConfig = {
            "configurable": {"thread_id": thread_id},
            "metadata": {"turn": tag},
            "recursion_limit": MAX_SUPERSTEPS,
        }

    async def open(self) -> bool:
        """Finds the head. True when it is this turn's own: an earlier attempt came that far. Raises Forgotten."""
        found = await self.newest(self._id, self._tag, self._base)
        if found is None:
            if self._base:
                # To go on with an empty conversation would do all of the run's work again, under new keys.
                raise Forgotten(
                    f"the store does not know checkpoint {self._base} of this run: was it restored older than Temporal?"
                    " Nothing is done until it is back; docs/operations.md, Backup and restore, says what to do"
                )
            return False
        self._head, self.head = found, found.config.get("configurable", {})["checkpoint_id"]
        self.carried = found.metadata.get("carried", {})  # type: ignore[typeddict-item]
        return found.metadata.get("turn") == self._tag

    def value(self, channel: str, default: Any) -> Any:
        """What a channel held at the head when the thread was opened."""
        return self._head.checkpoint["channel_values"].get(channel, default) if self._head else default

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        if _nested(config):
            return await super().aget_tuple(config)
        # A copy: LangGraph applies pending writes to what it is given.
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
        if self._lean and metadata.get("source") == "input":
            self._unstored = 2  # the input, and the step that hands it to the first node
        if self._unstored:
            self._unstored -= 1
        else:
            parent: RunnableConfig = {**config, "configurable": {"thread_id": self._id, "checkpoint_id": self.head}}
            stored: Any = {**metadata, "carried": self.carried} if self.carried else metadata
            await super().aput(parent, checkpoint, stored, new_versions)
            self.head = checkpoint["id"]
        return {"configurable": {"thread_id": self._id, "checkpoint_ns": "", "checkpoint_id": checkpoint["id"]}}

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        channels = {channel for channel, _ in writes}
        # A node that failed runs again. Its error says nothing to the next attempt, and may hold what must not be kept.
        failed = ERROR in channels and HANDLED not in channels
        if not failed and (_nested(config) or not self._lean):
            await super().aput_writes(config, writes, task_id, task_path)


def _nested(config: RunnableConfig) -> bool:
    """A subgraph's own thread, which has no turns."""
    return bool(config.get("configurable", {}).get("checkpoint_ns"))
