"""The activities of `BatchWorkflow`: what the items are, and the batch's own report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

from pydantic import ValidationError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.boundary import boundary, not_known_yet, this_workflow
from agents import registry
from holdfast import outside
from holdfast.batch import PAGE, BatchContext, BatchReport, BatchSpec, Item, ItemPage, ListRequest
from holdfast.reliability.errors import ErrorType
from holdfast.runtime import Runtime
from holdfast.tools import ToolFailed, ToolRefused, explain

T = TypeVar("T")
MAX_ID = 200
"""Characters of an item's id, which is a part of its run's."""


class Batches:
    def __init__(self, runtime: Runtime) -> None:
        self._home = runtime.settings.home

    @activity.defn(name="list_items")
    async def list_items(self, request: ListRequest) -> ItemPage:
        """The next items. Fails for good when the input is at fault; what else goes wrong is tried again."""
        with boundary():
            spec, value = _find(request.batch, request.input)
            items = await _work(lambda: spec.items(value, self._context()))
            return page(spec, list(items), request.after)

    @activity.defn(name="report_batch")
    async def report_batch(self, report: BatchReport) -> str:
        """Brings the batch's own results up to date, and says where they are. Idempotent."""
        with boundary():
            spec, value = _find(report.batch, report.input)
            return await _work(lambda: spec.report(value, self._context(), report))

    def _context(self) -> BatchContext:
        return BatchContext(this_workflow(), self._home)


def page(spec: BatchSpec, items: list[Item], after: str) -> ItemPage:
    """The items that follow the one with the id `after`. By id and not by number: the items may change meanwhile."""
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
