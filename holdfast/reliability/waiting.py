"""Waiting is not failing: a call that may not go out yet says when, and nobody holds a worker until then."""

from __future__ import annotations

from datetime import UTC, datetime

from holdfast.contracts import Wait


class NotYet(Exception):
    """The call did not go out and may be tried again after `delay` seconds. It counts as no attempt and no failure."""

    def __init__(self, delay: float, why: str, *, service: str = "") -> None:
        """service: set when its breaker is open, so that the call may be put off while other work goes on."""
        super().__init__(why)
        self.delay = delay
        self.why = why
        self.service = service

    @property
    def cause(self) -> str:
        """What the wait is for, as metrics count it."""
        return "breaker" if self.service else "rate limit"

    def wait(self, now: float) -> Wait:
        """As a result of an activity. now: epoch seconds by the store's clock, for this process's own may be wrong."""
        return Wait(until=datetime.fromtimestamp(now + max(self.delay, 0.0), UTC), why=self.why, service=self.service)


class NoAddress(NotYet):
    """It is not known where the service is, so nothing went out to it."""

    @property
    def cause(self) -> str:
        return "address"


class Unsettled(NotYet):
    """A request went out, and its service may still be at work on it."""

    @property
    def cause(self) -> str:
        return "outcome"
