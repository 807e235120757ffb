"""Any interleaving of many clients with one breaker: calls, crashes, freezes and late wakings, trips and resets.

Each client has a store clock of its own that is wrong by up to half a second. A call does what the protection chain
does: it looks, asks `admit` when the breaker is not closed, checks again when it acts more than a second after that,
and ends within its timeout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from holdfast.authoring.services import BreakerRule
from holdfast.contracts.failures import ErrorType, Failure
from holdfast.reliability.breaker import Breaker, Pass
from holdfast.reliability.ledger import Fenced
from holdfast.reliability.waiting import NotYet
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database
from holdfast.state.opening import open_database

TARGET = "pharmacy"
RULE = BreakerRule()
TIMEOUTS_S = (10.0, 60.0)
"""Of calls: a tool's, whose lease is shorter than an opening lasts, and a model's, whose lease is longer."""
STALE_S = 1.0
SKEW_S = 0.5
OUTCOME = st.sampled_from(["gone", "gone", "gone", "success", "refused", "bug"])
OUTCOMES: dict[str, Failure | None] = {
    "success": None,
    "gone": Failure(ErrorType.UNAVAILABLE, "503"),
    "refused": Failure(ErrorType.REFUSED, "400"),
    "bug": Failure(ErrorType.INTERNAL, "KeyError"),
}
CLIENT = st.integers(0, 3)
KEY = st.integers(0, 4)
N = st.integers(0, 7)
"""Which of the attempts that fit."""
T = TypeVar("T")


class World:
    """The true time."""

    def __init__(self) -> None:
        self.now = 1_000_000.0


class SkewedClock(StoreClock):
    def __init__(self, world: World, skew: float) -> None:
        self._world = world
        self._skew = skew

    async def now(self) -> float:
        return self._world.now + self._skew


@dataclass(eq=False)
class Attempt:
    """One worker's try of the call `key`, as the chain runs it. `sent_at`: its request has reached the service."""

    key: str
    breaker: Breaker
    passed: Pass
    let_in_at: float
    timeout_s: float
    sent_at: float | None = None
    frozen: bool = False
    before_reset: bool = False
    """A person has closed the breaker since: a probe in flight is a call like any other then."""

    @property
    def probing(self) -> bool:
        return self.passed.version > 0 and self.sent_at is not None and not self.frozen and not self.before_reset

    @property
    def ends_at(self) -> float:
        """When its timeout ends it, if nothing else does."""
        return self.sent_at + self.timeout_s if self.sent_at is not None and not self.frozen else float("inf")


def lease_s(timeout_s: float) -> float:
    return 2 * timeout_s + 2


class BreakerMachine(RuleBasedStateMachine):
    runner: ClassVar[asyncio.Runner]
    db: ClassVar[Database]

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.run(self.db.run("DELETE FROM breakers"))
        self.attempts: list[Attempt] = []
        self.last_probe: Attempt | None = None
        """The last one whose request went out since the breaker opened and that was not given back."""
        self.last_sent_at = 0.0
        self.fresh = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize(skews=st.lists(st.floats(-SKEW_S, SKEW_S), min_size=4, max_size=4), down=st.booleans())
    def start(self, skews: list[float], down: bool) -> None:
        clocks = [SkewedClock(self.world, skew) for skew in skews]
        self.breakers = [Breaker(self.db, clock, lambda: self.world.now) for clock in clocks]
        if down:
            self.goes_down(0)

    # -------------------------------------------------------------- a call

    @rule(
        client=CLIENT,
        key=KEY,
        timeout_s=st.sampled_from(TIMEOUTS_S),
        when=st.sampled_from(["now", "opening over", "lease over"]),
        late=st.floats(-2 * SKEW_S, 2 * SKEW_S),
        then=st.sampled_from(["waits", "sends", "sends and crashes", "sends and freezes"]),
    )
    def begin(self, client: int, key: int, timeout_s: float, when: str, late: float, then: str) -> None:
        """A try of a call, now or about when a probe is due. Of the same call another one may be there, but frozen."""
        row = self.row()
        if when != "now" and row is not None and row[0] == "open" and not row[4]:
            until = row[5] if when == "opening over" else max(row[5], row[6])
            self.pass_time(max(0.0, until + late - self.world.now))
        if all(each.frozen for each in self.attempts if each.key == f"run/{key}"):
            attempt = self.let_in(client, f"run/{key}", timeout_s)
            if attempt is not None and then != "waits":
                self.act(attempt)
                attempt.frozen = then == "sends and freezes"
                if then == "sends and crashes":
                    self.attempts.remove(attempt)

    def let_in(self, client: int, key: str, timeout_s: float = TIMEOUTS_S[0]) -> Attempt | None:
        breaker, row = self.breakers[client], self.row()
        passed = Pass(TARGET, RULE, failures=row[2] if row else 0, since=self.world.now)
        if row and (row[0] == "open" or row[3] > self.world.now):
            try:
                passed = self.run(breaker.admit(TARGET, RULE, key, lease_s(timeout_s)))
            except NotYet as wait:
                assert wait.delay > 0
                return None
        self.attempts.append(Attempt(key, breaker, passed, self.world.now, timeout_s))
        return self.attempts[-1]

    @rule(n=N, how=st.sampled_from(["sends", "sends", "leaves", "crashes", "freezes"]))
    def go_on(self, n: int, how: str) -> None:
        """What a call does that was let in some time ago; `leaves`: it does not go out after all."""
        if (attempt := self.pick(n, sent=False)) is None:
            return
        if how == "sends":
            self.act(attempt)
        elif how == "freezes":
            attempt.frozen = True
        else:
            self.attempts.remove(attempt)
            if how == "leaves":
                self.run(attempt.breaker.released(attempt.passed))

    def act(self, attempt: Attempt) -> None:
        if self.world.now - attempt.let_in_at > STALE_S:
            try:
                self.run(attempt.breaker.check(attempt.passed))
            except Fenced:
                self.attempts.remove(attempt)
                return
        if attempt.passed.version:
            for other in self.attempts:
                assert not other.probing or other.key == attempt.key, "two probers act at once"
            if self.last_probe is not None and self.last_probe.key != attempt.key:
                apart = self.world.now - self.last_sent_at
                assert apart >= RULE.probe_after_s - STALE_S - 2 * SKEW_S, f"two probes within {apart} s"
            self.last_probe, self.last_sent_at = attempt, self.world.now
        attempt.sent_at = self.world.now

    @rule(n=N, outcome=OUTCOME)
    def end(self, n: int, outcome: str) -> None:
        if attempt := self.pick(n, sent=True):
            self.report(attempt, outcome)

    def report(self, attempt: Attempt, outcome: str) -> None:
        self.attempts.remove(attempt)
        before, failure = self.row(), OUTCOMES[outcome]
        breaker, passed = attempt.breaker, attempt.passed
        self.run(breaker.failed(passed, failure) if failure else breaker.succeeded(passed))
        after = self.row()
        if not passed.version:
            assert before is None or before[0] == "closed" or after == before, "a call in flight moved an open breaker"
        elif before is None or passed.version != before[1]:
            assert after == before, "the report of an overtaken prober changed something"
        else:
            assert after is not None
            assert after[0] == ("closed" if outcome in ("success", "refused") else "open")
            if outcome == "bug":
                self.last_probe = None

    @rule(client=CLIENT)
    def goes_down(self, client: int) -> None:
        """Three calls in a row fail, if they get through."""
        self.pass_time(2 * SKEW_S)  # a call that began before the last change, by its own clock, does not count
        for _ in range(3):
            if attempt := self.let_in(client, self.new_key()):
                self.act(attempt)
                self.report(attempt, "gone")
        row = self.row()
        assert row is not None
        assert row[0] == "open" or row[3] > self.world.now - SKEW_S

    # -------------------------------------------------------------- waking, time

    @rule(n=N, outcome=st.sampled_from(sorted(OUTCOMES)))
    def wake(self, n: int, outcome: str) -> None:
        frozen = [each for each in self.attempts if each.frozen]
        if frozen:
            attempt = frozen[n % len(frozen)]
            attempt.frozen = False
            if attempt.sent_at is None:
                self.act(attempt)
            else:
                self.report(attempt, outcome)

    @rule(seconds=st.sampled_from([0.3, 2.0, 11.0, 21.5, 29.5, 31.0]))
    def pass_time(self, seconds: float) -> None:
        """Calls that reach their timeout meanwhile end there."""
        until = self.world.now + seconds
        while self.attempts and (first := min(self.attempts, key=lambda each: each.ends_at)).ends_at <= until:
            self.world.now = max(self.world.now, first.ends_at)
            self.report(first, "gone")
        self.world.now = until

    # -------------------------------------------------------------- by hand, and by the service

    @rule(client=CLIENT, what=st.sampled_from(["reset", "reset", "trip", "pause"]))
    def order(self, client: int, what: str) -> None:
        breaker = self.breakers[client]
        if what == "trip":
            self.run(breaker.trip(TARGET, "moving house", "lee"))
            assert self.let_in(client, self.new_key()) is None
        elif what == "reset":
            self.run(breaker.reset(TARGET, "lee"))
            for attempt in self.attempts:
                attempt.before_reset = True
        else:
            self.run(breaker.pause(TARGET, 25.0))

    # -------------------------------------------------------------- what holds

    @invariant()
    def a_breaker_that_closed_begins_anew(self) -> None:
        row = self.row()
        if row is None or row[0] == "closed":
            self.last_probe = None

    def teardown(self) -> None:
        """Whatever happened: once the service is well, a call gets through and the breaker is closed."""
        if not hasattr(self, "breakers"):
            return
        if (row := self.row()) and row[4]:
            self.run(self.breakers[0].reset(TARGET, "lee"))
        # The longest lease or pause; calls that end meanwhile fail, the last of them just now.
        self.pass_time(lease_s(max(TIMEOUTS_S)))
        self.pass_time(RULE.probe_after_s + 2 * SKEW_S)
        attempt = self.let_in(1, self.new_key())
        assert attempt is not None, f"stuck: {self.row()}"
        self.act(attempt)
        self.report(attempt, "success")
        row = self.row()
        assert row is None or row[0] == "closed"

    # -------------------------------------------------------------- helpers

    def new_key(self) -> str:
        self.fresh += 1
        return f"fresh/{self.fresh}"

    def pick(self, n: int, *, sent: bool) -> Attempt | None:
        fit = [each for each in self.attempts if not each.frozen and (each.sent_at is not None) is sent]
        return fit[n % len(fit)] if fit else None

    def row(self) -> tuple[Any, ...] | None:
        """state, version, failures, paused_until, held, probe_at, lease_until, …"""
        columns = "state, version, failures, paused_until, held, probe_at, lease_until, prober, changed_at, reason"
        return self.run(self.db.one(f"SELECT {columns} FROM breakers"))


def test_any_interleaving_of_many_clients_keeps_to_one_probe_at_a_time_and_recovers(store_url: str) -> None:
    with asyncio.Runner() as runner:
        db = runner.run(open_database(store_url))
        try:
            machine = type("BreakerOnThisStore", (BreakerMachine,), {"runner": runner, "db": db})
            run_state_machine_as_test(
                machine,
                settings=settings(
                    stateful_step_count=50,
                    deadline=None,
                    suppress_health_check=[HealthCheck.too_slow],
                ),
            )
        finally:
            runner.run(db.close())
