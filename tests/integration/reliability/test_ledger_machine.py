"""Any interleaving of what may happen to calls under the ledger: attempts, crashes, freezes, undo, people, replays.

Each attempt runs the real chain. It can be stopped, for as long as you like, where a process may freeze: between its
reservation and its call, between a probe's answer and the call, and between the effect and its record. While it stands
there others go on; it may die there. The outside counts real effects. A service may be at work on a request for a while
after its client is gone, but no longer than `SETTLES_S`. What a person says of a call is the truth.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from holdfast.contracts.failures import ToolRefused
from holdfast.contracts.profile import Effect
from holdfast.reliability import chain
from holdfast.reliability.chain import Guards, RetryLater, protected
from holdfast.reliability.ledger import Call, Entry, Fenced, Grant, Ledger, Settled, State, tool_call
from holdfast.reliability.waiting import Unsettled
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database
from holdfast.state.opening import open_database

T = TypeVar("T")
KINDS = [Effect.IDEMPOTENT, Effect.PROBE, Effect.MANUAL, "model"]
"""What changes something outside, and model calls: there nothing is reserved, but the answer is kept."""
SETTLES_S = 5.0
N = st.integers(0, 7)
"""Which of the attempts that fit."""

ENDS: dict[str, tuple[bool, Exception | None]] = {
    "done": (True, None),
    "done, answer lost": (True, ConnectionResetError("reset")),
    "still at work": (False, ConnectionResetError("reset")),
    "bug after it": (True, KeyError("patient")),
    "lost on the way": (False, ConnectionResetError("reset")),
    "nobody there": (False, ConnectionRefusedError("refused")),
    "refused": (False, ToolRefused("no")),
}
"""Whether the effect happens, and what the tool raises."""


class Stopwatch:
    """The chain's monotonic clock, in place of its module `time`: whoever stood still finds that time has passed."""

    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


class Clock(StoreClock):
    """The store's clock, which goes by the stopwatch."""

    def __init__(self, db: Database, watch: Stopwatch) -> None:
        super().__init__(db)
        self._watch = watch

    async def now(self) -> float:
        return 1000.0 + self._watch.seconds


def call_of(kind: Effect | str, n: int) -> Call:
    key = f"run/{n}"
    if kind == "model":
        return Call(key, "run", "model", "turn-1", Effect.READ, None, "asked", retries=2)
    return tool_call(key, "run", "order", Effect(kind), {"n": n}, retries=2, timeout_s=3, settles_s=SETTLES_S)


@dataclass(eq=False)
class Attempt:
    """One worker's try of a call, as the chain runs it."""

    call: Call
    ends: str
    task: asyncio.Task[Settled] | None = None
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    on: asyncio.Event = field(default_factory=asyncio.Event)

    async def stops(self) -> None:
        """Stands still until it is told to go on."""
        self.stopped.set()
        await self.on.wait()
        self.on.clear()


current: ContextVar[Attempt] = ContextVar("current")


class StopsWhenReserved(Ledger):
    async def reserve(self, call: Call, *, admitted: bool = True) -> Grant | Settled | None:
        held = await super().reserve(call, admitted=admitted)
        if isinstance(held, Grant):
            await current.get().stops()
        return held


class LedgerMachine(RuleBasedStateMachine):
    runner: ClassVar[asyncio.Runner]
    db: ClassVar[Database]
    watch: ClassVar[Stopwatch]
    kind: ClassVar[Effect | str]

    def __init__(self) -> None:
        super().__init__()
        self.run(self.db.run("DELETE FROM effects"))
        self.guards = Guards(self.db, "w")
        self.guards.clock = Clock(self.db, self.watch)
        self.guards.ledger = StopsWhenReserved(self.db, "w", self.guards.clock)
        self.ledger = Ledger(self.db, "the other side", self.guards.clock)
        self.at_work: list[tuple[str, float]] = []
        """Requests that the service has not come to yet, and until when it may."""
        self.attempts: list[Attempt] = []
        self.effects: Counter[str] = Counter()
        """How often each call really happened. The service of an idempotent one honours the key."""
        self.answers = 0
        self.call = call_of(self.kind, 1)
        """The call that attempts are made of now."""
        self.undone: set[str] = set()
        """Calls whose undo has begun."""
        self.made_good: set[str] = set()
        """Calls whose undo has run, when nothing could come to an effect any more."""
        self.stood_in: set[str] = set()
        """Calls that another one stands in for."""
        self.settled: dict[str, Settled] = {}
        """What was once known for good."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        for each in list(self.attempts):
            self.run(self.killed(each))

    # -------------------------------------------------------------- attempts

    @precondition(lambda self: self.call.key in self.settled)
    @rule()
    def next_call(self) -> None:
        """Of the same kind. Attempts of the calls before may still stand somewhere."""
        self.call = call_of(self.kind, int(self.call.key.removeprefix("run/")) + 1)

    @rule(ends=st.sampled_from(list(ENDS)))
    def begin(self, ends: str) -> None:
        """An attempt goes as far as its first stop, or learns at once what is settled."""
        attempt, happened = Attempt(self.call, ends), self.effects.copy()
        self.run(self.started(attempt))
        if self.call.key in self.settled:
            assert attempt.task and attempt.task.done()
            assert attempt.task.result() == self.settled[self.call.key]
            assert self.effects == happened, "what is settled is not done again"

    @precondition(lambda self: self.attempts)
    @rule(n=N)
    def goes_on(self, n: int) -> None:
        """A stopped attempt wakes: long after, as far as it knows."""
        self.pass_time(2)
        self.run(self.awake(self.attempts[n % len(self.attempts)]))

    @precondition(lambda self: self.attempts)
    @rule(n=N)
    def crash(self, n: int) -> None:
        self.run(self.killed(self.attempts[n % len(self.attempts)]))

    @rule(seconds=st.sampled_from([1, 4, 15]))
    def pass_time(self, seconds: int) -> None:
        """What the service has not come to by then it has given up."""
        self.watch.seconds += seconds
        self.at_work = [(key, until) for key, until in self.at_work if self.watch.seconds < until]

    @precondition(lambda self: self.at_work)
    @rule(n=N)
    def lands(self, n: int) -> None:
        """The service comes to a request whose client is long gone."""
        key, _ = self.at_work.pop(n % len(self.at_work))
        self.happens(key)

    def happens(self, key: str) -> None:
        if self.kind == Effect.IDEMPOTENT and self.effects[key]:
            return  # its service honours the key
        assert key not in self.made_good, "it comes to its effect after its undo"
        self.effects[key] += 1

    async def started(self, attempt: Attempt) -> None:
        current.set(attempt)
        work = protected(self.guards, attempt.call, self.act_of(attempt), self.probe_of(attempt))
        attempt.task = asyncio.create_task(work)
        self.attempts.append(attempt)
        await self.until_it_stops(attempt)

    async def awake(self, attempt: Attempt) -> None:
        attempt.stopped.clear()
        attempt.on.set()
        await self.until_it_stops(attempt)

    async def until_it_stops(self, attempt: Attempt) -> None:
        assert attempt.task is not None
        stopped = asyncio.create_task(attempt.stopped.wait())
        await asyncio.wait([attempt.task, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if attempt.task.done():
            self.attempts.remove(attempt)
            error = attempt.task.exception()
            if error is not None and not isinstance(error, RetryLater | Fenced | Unsettled):
                raise error

    async def killed(self, attempt: Attempt) -> None:
        assert attempt.task is not None
        attempt.task.cancel()
        await asyncio.wait([attempt.task])
        self.attempts.remove(attempt)

    def act_of(self, attempt: Attempt) -> chain.Act:
        key = attempt.call.key

        async def act(number: int) -> str:
            happens, error = ENDS[attempt.ends]
            assert key not in self.undone, "it acts after its undo has begun"
            if happens and attempt.call.kind != "model":
                self.happens(key)
            if attempt.ends == "still at work" and attempt.call.kind != "model":
                self.at_work.append((key, self.watch.seconds + SETTLES_S))
            await attempt.stops()
            if error:
                raise error
            self.answers += 1
            return f"answer {self.answers}"

        return act

    def probe_of(self, attempt: Attempt) -> chain.Act:
        async def probe(number: int) -> str | None:
            found = "found" if self.effects[attempt.call.key] else None
            await attempt.stops()
            return found

        return probe

    # -------------------------------------------------------------- the rest of the platform

    @precondition(lambda self: self.kind != "model")
    @rule(do=st.sampled_from(["unwind", "stand in", "settle", "replay"]))
    def something_else(self, do: str) -> None:
        call, key = self.call, self.call.key
        match do:
            case "unwind":
                self.undone.add(key)
                state, _, ended = self.run(self.ledger.seize(call, "the run was undone"))
                waits = state is State.UNKNOWN and self.watch.seconds + 1000 < ended + SETTLES_S
                if state is not State.FAILED and self.effects[key] and not waits:
                    self.run(self.ledger.compensated(key))
                    self.made_good.add(key)
            case "stand in":
                if self.run(self.ledger.give_way(call, "its service is down")):
                    self.stood_in.add(key)
            case "settle":
                # Ada waits until the service has done what it will do.
                self.pass_time(20)
                if self.run(self.ledger.settle(key, self.effects[key] > 0, "by hand", "says ada")):
                    self.settled.pop(key, None)
            case "replay":  # the platform refuses where it was undone, or another one stood in
                if key not in self.undone | self.stood_in and self.run(self.ledger.reopen(key)):
                    self.settled.pop(key, None)

    # -------------------------------------------------------------- what always holds

    def rows(self) -> dict[str, Entry]:
        return {entry.key: entry for entry in self.run(self.ledger.entries("run"))}

    @invariant()
    def never_two_effects(self) -> None:
        for key, times in self.effects.items():
            assert times + (key in self.stood_in) <= 1, f"{key} happened twice"

    @invariant()
    def never_a_lost_one(self) -> None:
        rows = self.rows()
        for key, times in self.effects.items():
            if not times:
                continue
            open_ = [State.RESERVED, State.UNKNOWN]
            state = rows[key].state
            assert state in [State.DONE, State.COMPENSATED, *open_], f"{key} happened and is said to be {state}"

    @invariant()
    def never_one_that_did_not_happen(self) -> None:
        for key, row in self.rows().items():
            if row.state in (State.DONE, State.COMPENSATED) and row.kind != "model":
                assert self.effects[key], f"{key} did not happen and is said to be {row.state}"

    @invariant()
    def what_is_settled_stays_so(self) -> None:
        rows = self.rows()
        for key, known in self.settled.items():
            now = rows[key].settled
            assert now is not None
            undone = known.state is State.DONE and now.state is State.COMPENSATED
            doubtful = known.state is State.UNKNOWN and now.state is State.COMPENSATED
            assert now.result == known.result and (now.state is known.state or undone or doubtful)
        self.settled.update({key: row.settled for key, row in rows.items() if row.settled})


@pytest.mark.parametrize("kind", KINDS)
def test_any_interleaving_makes_no_second_effect_and_loses_none(
    store_url: str, monkeypatch: pytest.MonkeyPatch, kind: Effect | str
) -> None:
    watch = Stopwatch()
    monkeypatch.setattr(chain, "time", watch)
    with asyncio.Runner() as runner:
        db = runner.run(open_database(store_url))
        try:
            ground = {"runner": runner, "db": db, "watch": watch, "kind": kind}
            machine = type("LedgerOnThisStore", (LedgerMachine,), ground)
            run_state_machine_as_test(
                machine,
                settings=settings(
                    stateful_step_count=25,
                    deadline=None,
                    suppress_health_check=[HealthCheck.too_slow],
                ),
            )
        finally:
            runner.run(db.close())
