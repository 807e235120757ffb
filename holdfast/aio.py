"""Waiting for what a cancellation must not cut."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Awaits work to its end, whatever cancels the caller meanwhile. The work itself has to be bounded."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # not the caller's cancellation but the end of the loop that both run in
                raise
    return task.result()
