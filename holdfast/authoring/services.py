"""Declares external services for rate limits and circuit breakers: once, the same for every agent and worker.

An agent lists the services it declares in `AgentSpec.services`. A service that no agent declares has the default
circuit breaker and no rate limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LONGEST_BOUND_S = 86_400.0
"""Upper bound of `settles_within`, in seconds."""


@dataclass(frozen=True)
class BreakerRule:
    """When the circuit breaker of a service opens, and when it probes the service."""

    failures: int | None = 3
    """Opens after this many failures in a row; None: never for that reason."""
    share: float | None = None
    """Opens when at least this share (0…1) of a window's calls fail. Costs each call an SQL statement."""
    window_s: float = 60.0
    min_calls: int = 10
    """Fewest calls of a window for which `share` counts."""
    probe_after_s: float = 30.0
    """Seconds from opening to the first probe, and from a failed probe to the next."""

    def __post_init__(self) -> None:
        if self.failures is None and self.share is None:
            raise TypeError("a breaker rule without `failures` and `share` would never open")
        if (self.failures or 1) < 1 or not 0 < (self.share or 1) <= 1 or self.probe_after_s <= 0:
            raise TypeError("a breaker rule needs failures >= 1, a share in (0, 1] and probe_after_s > 0")


@dataclass(frozen=True)
class Limit:
    """A rate limit, shared by all workers. `name` is its row in the store."""

    name: str
    requests: int | None = None
    """Per sliding minute."""
    tokens: int | None = None
    """Per sliding minute."""

    def __post_init__(self) -> None:
        if (self.requests or 1) < 1 or (self.tokens or 1) < 1:
            raise TypeError(f"limit {self.name}: at least one per minute, or None for no limit")


def check_bound(what: str, settles_within: float | None) -> None:
    """Raises TypeError unless it is None or a number of seconds."""
    if settles_within is not None and not 0 <= settles_within <= LONGEST_BOUND_S:
        raise TypeError(
            f"{what}: settles_within={settles_within}: expected seconds, 0 to {LONGEST_BOUND_S:,.0f} (a day), or None"
        )


@dataclass(frozen=True)
class InFlight:
    """A limit of concurrent calls, shared by all workers."""

    name: str
    most: int


@dataclass(frozen=True)
class Service:
    """Declares an external service. Each tenant has a rate limit and a circuit breaker of its own."""

    name: str
    breaker: BreakerRule = field(default_factory=BreakerRule)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    settles_within: float | None = None
    """Seconds after which a request that has had no effect will never have one; a tool may declare its own value. None:
    unknown."""
    max_in_flight: int | None = None
    """Concurrent calls of all workers together; None: no limit. For services that allow only a few, because each call
    then asks the store."""

    def __post_init__(self) -> None:
        check_bound(f"service {self.name}", self.settles_within)
        if (self.max_in_flight or 1) < 1:
            raise TypeError(f"service {self.name}: max_in_flight is at least one, or None for no limit")

    def in_flight(self, tenant: str) -> InFlight | None:
        return InFlight(self.target(tenant), self.max_in_flight) if self.max_in_flight else None

    def target(self, tenant: str) -> str:
        """Returns the circuit breaker's name."""
        return self.name if tenant == "default" else f"{self.name}@{tenant}"

    def limit(self, tenant: str) -> Limit | None:
        if self.requests_per_minute is None and self.tokens_per_minute is None:
            return None
        return Limit(self.target(tenant), self.requests_per_minute, self.tokens_per_minute)
