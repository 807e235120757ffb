"""Declares batches. A batch starts one run of an agent per item, a window at a time.

An agent's `spec.py` may hold a `BATCH` beside its `SPEC`; `workflows.batch` runs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from holdfast.authoring.agent import AgentSpec
from holdfast.contracts.batch import BatchProfile, BatchReport, Item


def item_id(name: str) -> str:
    """Returns a readable, unique id for an item's name, which may be a file name that is not valid Unicode."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:48]
    return f"{slug}-{sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"


@dataclass(frozen=True)
class BatchContext:
    """What a batch's functions may use: its workflow id, and the folder where this worker keeps files."""

    id: str
    home: Path

    @property
    def workspace(self) -> Path:
        """The batch's own folder, unless its input names another."""
        return self.home.resolve() / "workspace" / self.id


# ------------------------------------------------------------------ what crosses the workflow boundary


# ------------------------------------------------------------------ the declaration


@dataclass(frozen=True)
class BatchSpec:
    """Declares a batch. `holdfast.authoring.registry` finds every `BATCH` in `agents/*/spec.py`."""

    name: str
    description: str
    input: type[BaseModel]
    """The input of a batch, validated before the batch starts."""
    agent: AgentSpec
    """The agent that runs for each item."""
    items: Callable[[Any, BatchContext], Sequence[Item]]
    """`(input, context)`: returns all current items, in any order. Raises ToolRefused when the input is wrong."""
    report: Callable[[Any, BatchContext, BatchReport], str]
    """`(input, context, report)`: updates the batch's results and returns a text that says where they are. Must be
    idempotent."""
    queue: str = ""
    """The stage in which `items` and `report` run."""
    unit: str = "items"
    window: int = 20
    """Items that run at the same time."""
    most_open: int = 200
    """Open items, including those that wait for a service or a person; these free their place in the window."""
    every: int = 10
    """Items between two reports."""
    items_per_execution: int = 400
    """Items of one execution before continue-as-new, which the server may also suggest earlier."""

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
