"""The store's time, so that workers whose clocks differ agree on what is due."""

from __future__ import annotations

import time

from holdfast.state.database import Database

STALE_S = 60.0
"""Seconds after which the store is asked again: a monotonic clock drifts, and stops while a machine sleeps."""


class StoreClock:
    """Epoch seconds by the store's clock, computed from this process's monotonic clock."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._offset = 0.0
        self._asked_at = float("-inf")

    async def now(self) -> float:
        """Returns the time. Asks the store if the last answer is more than a minute old."""
        before = time.monotonic()
        if before - self._asked_at > STALE_S:
            store_time = await self._db.time()
            after = time.monotonic()
            self._offset, self._asked_at = store_time - (before + after) / 2, after
            return store_time
        return before + self._offset
