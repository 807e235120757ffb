"""The activities of `BatchWorkflow`: they list the items and write the batch's report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

from pydantic import ValidationError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.boundary import boundary, not_known_yet, this_workflow
from holdfast.authoring import registry
from holdfast.authoring.batch import BatchContext, BatchSpec
from holdfast.contracts import outside
from holdfast.contracts.batch import PAGE, BatchReport, Item, ItemPage, ListRequest
from holdfast.contracts.failures import ErrorType, ToolFailed, ToolRefused, explain
from holdfast.engine.runtime import Runtime

T = TypeVar("T")
MAX_ID = 200
"""Characters of an item's id, which becomes a part of its run's id."""


class Batches:
    def __init__(self, runtime: Runtime) -> None:
        self._home = runtime.settings.home

    @activity.defn(name="list_items")
    async def list_items(self, request: ListRequest) -> ItemPage:
        """The next items. Invalid input fails for good; other errors are tried again."""
        with boundary():
            spec, value = _find(request.batch, request.input)
            items = await _work(lambda: spec.items(value, self._context()))
            return page(spec, list(items), request.after)

    @activity.defn(name="report_batch")
    async def report_batch(self, report: BatchReport) -> str:
        """Updates the batch's own results, and returns a text that says where they are. Idempotent."""
        with boundary():
            spec, value = _find(report.batch, report.input)
            return await _work(lambda: spec.report(value, self._context(), report))

    def _context(self) -> BatchContext:
        return BatchContext(this_workflow(), self._home)


def page(spec: BatchSpec, items: list[Item], after: str) -> ItemPage:
    """The items after the one with the id `after`. By id, not by position: the list may change meanwhile."""
    items.sort(key=lambda item: item.id)
    if twice := next((b.id for a, b in pairwise(items) if a.id == b.id), None):
        raise _refused(f"two {spec.unit} have the id {twice}")
    for item in items:
        if len(item.id) > MAX_ID or not item.id.isprintable():
            words = f"an id of {spec.unit} has to be printable text of at most {MAX_ID} characters"
            raise _refused(f"{words}: {item.id!r:.80}")
        if wrong := outside.problem(item.input, outside.MAX_INPUT):
            raise _refused(f"the input of {item.id} {wrong}")
    ahead = [item for item in items if item.id > after]
    profile = None if after else spec.profile
    return ItemPage(items=ahead[:PAGE], left=len(ahead), profile=profile)


async def _work(do: Callable[[], T]) -> T:
    try:
        return await asyncio.to_thread(do)
    except (ToolRefused, ToolFailed) as refused:
        raise _refused(str(refused)) from None


def _find(name: str, value: object) -> tuple[BatchSpec, object]:
    try:
        spec = registry.batch(name)
        return spec, spec.input.model_validate(value)
    except registry.UnknownAgent as error:
        raise not_known_yet(error) from None
    except ValidationError as error:
        raise _refused(f"the input does not fit batch {name}: {explain(error)}") from None


def _refused(words: str) -> ApplicationError:
    return ApplicationError(words, type=ErrorType.INVALID_INPUT, non_retryable=True)
