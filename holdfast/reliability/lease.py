"""The lease of an activity attempt: whether it is still the current one, as far as its own clock can tell.

When an attempt does not heartbeat in time, the server starts another one. Calls without a reservation (reads) have no
row that would tell them. The lease tells a process that was frozen that it must not record its result any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar


class Lease:
    """Held while it is renewed at least every `seconds`; once lost, it stays lost."""

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
"""The lease of the current attempt; None outside an activity that heartbeats."""


def lost() -> bool:
    lease = current.get()
    return lease is not None and lease.lost
