"""Batches: one run of an agent for each item, a window of them at a time. What a batch is, as data, and its messages.

An agent's `spec.py` may hold a `BATCH` beside its `SPEC`; `workflows.batch` runs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from holdfast.agent import AgentSpec
from holdfast.contracts import Items, Json, Phase, Usage

PAGE = 100
"""Items that are listed at a time."""
MAX_FAILURES = 50
"""So many failed items a batch names; it counts them all."""


class Item(BaseModel):
    """One item of a batch. `id`: stable, part of its run's workflow id. `name`: as people call it."""

    id: str
    name: str
    input: Json = {}


class ItemFailure(BaseModel):
    """An item that did not complete, and why."""

    id: str
    name: str
    why: str


def item_id(name: str) -> str:
    """An id for the item of this name, readable and unlike that of any other; also of a file's that is no Unicode."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:48]
    return f"{slug}-{sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"


@dataclass(frozen=True)
class BatchContext:
    """What a batch's own functions may use: its workflow id, and where this worker keeps files."""

    id: str
    home: Path

    @property
    def workspace(self) -> Path:
        """The batch's own folder, unless its input names another."""
        return self.home.resolve() / "workspace" / self.id


# ------------------------------------------------------------------ what crosses the workflow boundary


class BatchProfile(BaseModel):
    """The batch's spec as data, carried so that a deploy changes none that is under way."""

    agent: str
    queue: str = ""
    unit: str = "items"
    window: int = 20
    most_open: int = 200
    every: int = 10
    items_per_execution: int = 400


class ListRequest(BaseModel):
    """Input of the activity `list_items`. after: the id of the last item that was started."""

    batch: str
    input: Json = {}
    after: str = ""


class ItemPage(BaseModel):
    """The next items in the order of their ids. `left`: how many are left with these. `profile`: of the first page."""

    items: list[Item] = []
    left: int = 0
    profile: BatchProfile | None = None


class BatchReport(BaseModel):
    """Input of the activity `report_batch`. `ended`: this is the last one."""

    batch: str
    input: Json = {}
    items: Items = Items()
    failures: list[ItemFailure] = []
    ended: bool = False


class ChildNews(BaseModel):
    """Payload of the Signal `child`: the run `id` stands still (odd `n`) or goes on (even). The highest n holds."""

    id: str
    n: int


class BatchInput(BaseModel):
    """Input of `BatchWorkflow`."""

    batch: str
    input: Json = {}
    request_key: str = ""
    requested_by: str = ""
    tenant: str = "default"
    trace_id: str = ""
    queue: str = ""
    """The stage that lists the items, until the batch's profile says so."""
    state: dict[str, Any] | None = None
    """Set by continue-as-new only: the dumped `BatchState`."""


class BatchState(BaseModel):
    """All that a batch carries over continue-as-new: a cursor and counts, nothing per item but the first failures."""

    key_base: str
    started: datetime
    phase: Phase = Phase.STARTING
    profile: BatchProfile | None = None
    after: str = ""
    """The id of the last item that was started."""
    listed: bool = False
    """No item comes after those that were listed."""
    total: int = 0
    done: int = 0
    failed: int = 0
    failures: list[ItemFailure] = []
    reported: int = 0
    """Items that had ended when the last report was made."""
    words: str = ""
    """What the last report said."""
    marks: list[tuple[datetime, int]] = []
    """When how many had ended, the last few: the rate."""
    usage: Usage = Usage()
    turns: int = 0
    calls: int = 0
    call_failures: int = 0
    notes: list[str] = []


# ------------------------------------------------------------------ the declaration


@dataclass(frozen=True)
class BatchSpec:
    """A batch. `agents.registry` finds every `BATCH` in `agents/*/spec.py`."""

    name: str
    description: str
    input: type[BaseModel]
    """What a batch is started with; checked at the door."""
    agent: AgentSpec
    """What runs for each item."""
    items: Callable[[Any, BatchContext], Sequence[Item]]
    """`(input, context)`: all items there are now, in any order. Raises ToolRefused when the input is at fault."""
    report: Callable[[Any, BatchContext, BatchReport], str]
    """`(input, context, report)`: brings the batch's own results up to date, and says where they are. Idempotent."""
    queue: str = ""
    """The stage in which `items` and `report` run."""
    unit: str = "items"
    window: int = 20
    """Items at work at a time."""
    most_open: int = 200
    """With those that stand still because a service is down, or a person is asked: they give their place to others."""
    every: int = 10
    """A report after so many items."""
    items_per_execution: int = 400
    """Continue-as-new after so many items of one execution (the server's own suggestion counts as well)."""

    @property
    def profile(self) -> BatchProfile:
        return BatchProfile(
            agent=self.agent.name,
            queue=self.queue,
            unit=self.unit,
            window=self.window,
            most_open=self.most_open,
            every=self.every,
            items_per_execution=self.items_per_execution,
        )
