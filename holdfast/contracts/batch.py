"""A batch: its input, its state, and the messages of its activities and children."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel

from holdfast.contracts.data import Json
from holdfast.contracts.run import Items, Phase
from holdfast.contracts.turn import Usage

PAGE = 100
"""Items per page of a listing."""


MAX_FAILURES = 50
"""Failed items that a batch names; it counts all of them."""


class Item(BaseModel):
    """One item of a batch. `id`: stable, part of its run's workflow id. `name`: for people."""

    id: str
    name: str
    input: Json = {}


class ItemFailure(BaseModel):
    """An item that did not complete, and the reason."""

    id: str
    name: str
    why: str


class BatchProfile(BaseModel):
    """The batch's spec as data. A batch carries it, so that a deploy changes no running batch."""

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
    """The next items, sorted by id. `left`: items left, including these. `profile`: on the first page only."""

    items: list[Item] = []
    left: int = 0
    profile: BatchProfile | None = None


class BatchReport(BaseModel):
    """Input of the activity `report_batch`. `ended`: this is the last report."""

    batch: str
    input: Json = {}
    items: Items = Items()
    failures: list[ItemFailure] = []
    ended: bool = False


class ChildNews(BaseModel):
    """Payload of the Signal `child`: the run `id` is parked or waits for a person, or goes on.

    Two Signals of a run may arrive in the wrong order: the one with the highest `number` counts.
    """

    id: str
    number: int
    waits: bool


class BatchInput(BaseModel):
    """Input of `BatchWorkflow`."""

    batch: str
    input: Json = {}
    request_key: str = ""
    requested_by: str = ""
    tenant: str = "default"
    trace_id: str = ""
    queue: str = ""
    """The stage that lists the items, until the batch has its profile."""
    state: dict[str, Any] | None = None
    """Set by continue-as-new only: the dumped `BatchState`."""


class BatchState(BaseModel):
    """State that a batch carries over continue-as-new: a cursor, counts and the first failures; no other item data."""

    key_base: str
    started: datetime
    phase: Phase = Phase.STARTING
    profile: BatchProfile | None = None
    after: str = ""
    """The id of the last item that was started."""
    listed: bool = False
    """All items have been listed."""
    total: int = 0
    done: int = 0
    failed: int = 0
    failures: list[ItemFailure] = []
    reported: int = 0
    """Items that had ended at the last report."""
    words: str = ""
    """Text of the last report."""
    marks: list[tuple[datetime, int]] = []
    """The last few pairs of a time and the items ended by then, for the rate."""
    usage: Usage = Usage()
    turns: int = 0
    calls: int = 0
    call_failures: int = 0
    notes: list[str] = []
