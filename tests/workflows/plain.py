"""A workflow as many are: its handlers act at once. In a module of its own, which the sandbox can import."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from temporalio import activity, workflow

with workflow.unsafe.imports_passed_through():
    from holdfast.temporal import STATUS


@activity.defn
async def book(n: int) -> None:
    """Nothing."""


@workflow.defn
class Plain:
    """What happens to any workflow: its handlers act at once."""

    def __init__(self) -> None:
        self.got: list[str] = []

    @workflow.run
    async def run(self) -> None:
        await asyncio.gather(self.after(0), self.after(1), self.held())

    async def after(self, n: int) -> None:
        await workflow.wait_condition(lambda: len(self.got) > n)
        await workflow.execute_activity(book, n, start_to_close_timeout=timedelta(seconds=10))

    async def held(self) -> None:
        await workflow.execute_activity("hold", start_to_close_timeout=timedelta(minutes=2))
        await workflow.sleep(0.01)

    @workflow.signal
    def tell(self, what: str) -> None:
        self.got.append(what)
        workflow.upsert_search_attributes([STATUS.value_set(what)])

    @workflow.update
    def ask(self, what: str) -> int:
        self.tell(what)
        return len(self.got)

    @workflow.query
    def told(self) -> int:
        return len(self.got)
