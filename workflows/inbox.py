"""What comes from outside while a run works: Signals and Updates, taken one at a time.

How many of them a workflow task brings depends on the speed of workers and of the server. So two that come together
must do what they do when they come apart: everything that follows from the first, in whatever coroutine, is scheduled
before the second is taken. Otherwise the order of the commands would depend on how they were batched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from temporalio import workflow

ROUNDS = 8
"""How long a chain of `wait_condition`s may be of which each waits for the one before."""

T = TypeVar("T")


class Inbox:
    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # first come, first served
        self._in_turn: bool | None = None

    def quiet(self) -> bool:
        """Nothing is being taken and nothing waits to be."""
        return not self._turn.locked()

    async def take(self, act: Callable[[], T]) -> T:
        """Runs `act` when its turn has come; what it says. `act` changes the state at once and waits for nothing.

        A handler does nothing but call this, and is unfinished until its item is taken: a run that waits for
        `all_handlers_finished` before it ends or continues as new leaves nothing behind.
        """
        if self._in_turn is None:
            # Decided by the first item that the run ever gets, which is the same one however items are batched. A run
            # that got one before there was an inbox goes on without it.
            self._in_turn = workflow.patched("one-item-at-a-time")
        if not self._in_turn:
            return act()
        async with self._turn:
            said = act()
            for _ in range(ROUNDS):
                # Conditions are looked at when no coroutine can go on: each round lets through those that have become
                # true, and all that they wake goes as far as it can.
                await workflow.wait_condition(lambda: True)
            return said
