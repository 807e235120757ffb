"""Signals and Updates that arrive while a run works, taken one at a time.

How many of them one workflow task carries depends on the speed of the workers and of the server. Two that arrive
together must have the same effect as two that arrive apart: the inbox takes the second only when everything that
follows from the first, in any coroutine, is scheduled. Otherwise the order of the commands would depend on the
batching.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from temporalio import workflow

ROUNDS = 8
"""The longest supported chain of `wait_condition`s in which each waits for the one before."""

T = TypeVar("T")


class Inbox:
    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # first come, first served

    def quiet(self) -> bool:
        """Whether no item is being taken and none is queued."""
        return not self._turn.locked()

    async def take(self, act: Callable[[], T]) -> T:
        """Runs `act` when its turn has come, and returns its result. `act` changes the state at once, without awaiting.

        A handler only calls this, and is unfinished until its item is taken. So a run that waits for
        `all_handlers_finished` before it ends or continues as new loses no item.
        """
        async with self._turn:
            said = act()
            for _ in range(ROUNDS):
                # The SDK checks conditions when no coroutine can proceed. Each round resumes those that have become
                # true, and everything they wake runs as far as it can.
                await workflow.wait_condition(lambda: True)
            return said
