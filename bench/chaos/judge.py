"""What must hold of every run after the chaos: pure functions over what the services themselves have on record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.sweep.cases import EFFECTS
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import RunOutcome, RunResult
from holdfast.dev.simulation.hospital import EffectRow
from holdfast.dev.simulation.scripted_model import CallRow
from holdfast.recovery.dead_letters import DeadLetter
from holdfast.reliability.ledger import Entry, State

HELD_S = 1.0
"""So soon after a link passes on what it has held back, the model has received it."""
CLOCK_S = 0.25
"""Two processes of one machine may read the clock this far apart while they are busy."""


@dataclass(frozen=True)
class Record:
    """Everything on record about one run."""

    workflow_id: str
    status: str
    """Temporal's word: COMPLETED, TERMINATED, …"""
    result: RunResult | None
    """The store's."""
    ledger: list[Entry] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)
    effects: list[EffectRow] = field(default_factory=list)
    """The hospital's."""
    calls: list[CallRow] = field(default_factory=list)
    """The model's."""
    replay_error: str = ""
    released: Sequence[float] = ()
    """When links to the model passed on requests that they had held back."""


@dataclass(frozen=True)
class Violation:
    kind: str
    """doubled, lost, standing, stuck, paid again, disagreement, no replay, failed."""
    workflow_id: str
    words: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.workflow_id}: {self.words}"


def judge(record: Record) -> list[Violation]:
    """What is wrong with this run."""
    found = [("no replay", record.replay_error)] if record.replay_error else []
    if record.result is None and record.status == "TERMINATED" and not has_effects(record.ledger):
        pass  # it was terminated before it had done anything, so there is nothing to undo
    elif record.result is None:
        found.append(("stuck", f"the run did not end: Temporal says {record.status}"))
    else:
        found += _outcome(record.result)
    found += _effects(record)
    found += _model_calls(record)
    return [Violation(kind, record.workflow_id, words) for kind, words in found]


def has_effects(ledger: list[Entry]) -> bool:
    """Whether a run has begun anything outside that would have to be undone."""
    return any(entry.kind == "tool" and entry.effect != Effect.READ for entry in ledger)


def _outcome(result: RunResult) -> list[tuple[str, str]]:
    """Every service comes back within every call's patience, and the model always knows what to do."""
    if result.outcome is RunOutcome.FAILED:
        return [("failed", result.reason)]
    return []


def _effects(record: Record) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    counted = Counter((effect.kind, effect.key) for effect in record.effects)
    outcome = record.result.outcome if record.result else None
    told = _told(record)
    # An undo that has looked and found nothing settles the call as well.
    looked = {e.key.removesuffix("/undo") for e in record.ledger if (e.kind, e.state) == ("undo", State.DONE)}
    for tool, words in EFFECTS.items():
        net = 0
        for entry in (e for e in record.ledger if (e.kind, e.name) == ("tool", tool)):
            done = counted.pop((words.effect, entry.key), 0)
            undone = counted.pop((words.undo, entry.key + words.undo_suffix), 0) if words.undo else 0
            net += done - undone
            if done > 1 or undone > 1:
                found.append(("doubled", f"{entry.key} ({tool}): done {done} times, undone {undone} times"))
            found += _agreement(entry, tool, done, undone, told, looked)
        if net > 1:
            found.append(("doubled", f"{tool}: {net} effects under different keys"))
        if net == 0 and outcome is RunOutcome.COMPLETED:
            found.append(("lost", f"{tool}: the run completed without it"))
        if net > 0 and outcome is not None and outcome.unwinds and words.undo and not told & _keys(record, tool):
            found.append(("standing", f"{tool}: its effect stands although the run ended {outcome}"))
    found += [("doubled", f"{times} × {kind} under {key}, which no call has") for (kind, key), times in counted.items()]
    return found


def _agreement(
    entry: Entry, tool: str, done: int, undone: int, told: set[str], looked: set[str]
) -> list[tuple[str, str]]:
    """The ledger says what the hospital says; what it does not know, a person is asked about."""
    match entry.state:
        case State.DONE:
            # An undo that worked, and whose answers were lost until its retries were used up, is a dead letter.
            right = (done, undone) == (1, 0) or ((done, undone) == (1, 1) and entry.key in told)
        case State.COMPENSATED:
            right = (done, undone) == (1, 1)
        case State.FAILED:
            right = done == undone
        case State.UNKNOWN | State.RESERVED:
            right = entry.key in told or (done == undone and (done == 1 or entry.key in looked))
    if right:
        return []
    words = f"{entry.key} ({tool}): ledger {entry.state}, the hospital did it {done} times and undid it {undone} times"
    # An effect that the ledger has as done and the hospital does not is lost work.
    return [("lost" if entry.state is State.DONE and not done else "disagreement", words)]


def _told(record: Record) -> set[str]:
    """Keys that people were told of: they are in a dead letter, or pending in the result."""
    pending = {each.key for each in record.result.pending} if record.result else set()
    return pending | {letter.key.removesuffix("/undo") for letter in record.letters if letter.key}


def _keys(record: Record, tool: str) -> set[str]:
    return {entry.key for entry in record.ledger if entry.name == tool}


def _model_calls(record: Record) -> list[tuple[str, str]]:
    recorded = {entry.key: entry for entry in record.ledger if entry.kind == "model"}
    found = []
    for call in record.calls:
        entry = recorded.get(call.key)
        if entry and entry.settled_at and entry.settled and call.received_at > entry.settled_at + CLOCK_S:
            if any(abs(call.received_at - at) < HELD_S for at in record.released):
                continue  # it was sent before, and was on its way all the while
            late = call.received_at - entry.settled_at
            found.append(("paid again", f"{entry.name}: called again {late:.1f} s after its answer was recorded"))
    return found
