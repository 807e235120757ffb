"""Whether this attempt is still the one that counts, as far as its own clock can tell.

The server gives an attempt that did not heartbeat in time to another worker. Where there is no reservation to look at
(reads have none), a process that was frozen learns from this that what it finds on waking is no longer its to record.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar


class Lease:
    """Held while it is renewed at least every `seconds`; once lost it stays lost."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._renewed = clock()
        self._lost = False

    def renew(self) -> None:
        self._lost = self.lost
        self._renewed = self._clock()

    @property
    def lost(self) -> bool:
        return self._lost or self._clock() - self._renewed > self._seconds


current: ContextVar[Lease | None] = ContextVar("lease", default=None)
"""The lease of the attempt that this code runs for; None outside of an activity that heartbeats."""


def lost() -> bool:
    lease = current.get()
    return lease is not None and lease.lost
