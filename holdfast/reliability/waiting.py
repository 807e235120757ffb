"""Exceptions for calls that have to wait. Waiting is not a failure, and it does not occupy a worker."""

from __future__ import annotations

from datetime import UTC, datetime

from holdfast.contracts.turn import Wait


class NotYet(Exception):
    """The call did not go out and may be tried again after `delay` seconds. It counts as no attempt and no failure."""

    def __init__(self, delay: float, why: str, *, service: str = "") -> None:
        """service: set when its circuit breaker is open, so that the call can be deferred while the run goes on."""
        super().__init__(why)
        self.delay = delay
        self.why = why
        self.service = service

    @property
    def cause(self) -> str:
        """The reason for the wait, as metrics count it."""
        return "breaker" if self.service else "rate limit"

    def wait(self, now: float) -> Wait:
        """Returns the activity result for this wait.

        now: epoch seconds by the store's clock, as this process's own clock may be wrong.
        """
        return Wait(until=datetime.fromtimestamp(now + max(self.delay, 0.0), UTC), why=self.why, service=self.service)


class NoAddress(NotYet):
    """The service has no configured address, so no request went out."""

    @property
    def cause(self) -> str:
        return "address"


class Unsettled(NotYet):
    """A request went out, and its service may still be processing it."""

    @property
    def cause(self) -> str:
        return "outcome"
