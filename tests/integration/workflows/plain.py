"""Workflows of tests about handlers, in a module of their own, which the sandbox can import."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from temporalio import activity, workflow

with workflow.unsafe.imports_passed_through():
    from holdfast.engine.client import STATUS
    from workflows.inbox import Inbox

LINKS = 6


@activity.defn
async def book(n: int) -> None:
    """Nothing."""


@workflow.defn
class Plain:
    """As many are: its handlers act at once."""

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


@workflow.defn
class Chained:
    """What is told passes through a chain of coroutines, each of which waits for the one before."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.passed = [0] * (LINKS + 1)

    @workflow.run
    async def run(self) -> None:
        await asyncio.gather(*(self.link(n) for n in range(LINKS)))
        await workflow.wait_condition(workflow.all_handlers_finished)

    async def link(self, n: int) -> None:
        for time in (1, 2):
            await workflow.wait_condition(lambda time=time: self.passed[n] >= time)
            self.passed[n + 1] += 1
            if n == LINKS - 1:
                await workflow.execute_activity(book, time, start_to_close_timeout=timedelta(seconds=10))

    @workflow.signal
    async def tell(self, what: str) -> None:
        await self.inbox.take(lambda: self.say(what))

    def say(self, what: str) -> None:
        self.passed[0] += 1
        workflow.upsert_search_attributes([STATUS.value_set(what)])

    @workflow.query
    def told(self) -> int:
        return self.passed[0]
