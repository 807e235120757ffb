"""The time as the store has it, so that workers whose clocks disagree still agree on who is due."""

from __future__ import annotations

import time

from holdfast.state.database import Database

STALE_S = 60.0
"""After so long the store is asked again: a monotonic clock drifts, and stands still while a machine sleeps."""


class StoreClock:
    """Epoch seconds by the store's clock, reckoned from this process's monotonic one."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._offset = 0.0
        self._asked_at = float("-inf")

    async def now(self) -> float:
        """The time; asks the store when it was last asked more than a minute ago."""
        before = time.monotonic()
        if before - self._asked_at > STALE_S:
            told = await self._db.time()
            after = time.monotonic()
            self._offset, self._asked_at = told - (before + after) / 2, after
            return told
        return before + self._offset
