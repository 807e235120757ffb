"""Counts what a run did, from the services' own records and the ledger. Pure functions.

Every request after the first with the same key is one of three: a retry after a real failure; a repeat because a worker
was killed before the answer was recorded, which cannot be avoided; or a repeat of a recorded call, which must never
happen.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from holdfast.dev.simulation.hospital import EffectRow, RequestRow
from holdfast.dev.simulation.scripted_model import CallRow
from holdfast.reliability.ledger import Entry, State

DONE = (State.DONE, State.COMPENSATED)


@dataclass(frozen=True)
class Sent:
    """One request as the service received it. `at` in epoch seconds."""

    service: str
    key: str
    what: str
    at: float
    answer: str
    """The answer's status; `none` without an answer."""


@dataclass
class Line:
    """One service's counts. `repeated`: repeats after a kill. `recorded`: repeats of calls with a recorded result."""

    service: str
    requests: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    effects: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    repeated: int = 0
    recorded: int = 0


def received(requests: Iterable[RequestRow], calls: Iterable[CallRow]) -> list[Sent]:
    """Requests to the hospital and calls to the model, in one form."""
    found = [
        Sent(each.service, each.key, f"{each.method} {each.path}", each.at, str(each.status or "none"))
        for each in requests
    ]
    return found + [
        Sent("model", each.key, "", each.received_at, "200" if each.answered_at else "none") for each in calls
    ]


def count(sent: Iterable[Sent], effects: Iterable[EffectRow], entries: Iterable[Entry]) -> list[Line]:
    """One line per service, in the order of their first requests."""
    ledger = {entry.key: entry for entry in entries}
    by_key: defaultdict[tuple[str, str, str], list[Sent]] = defaultdict(list)
    lines: dict[str, Line] = {}
    for each in sorted(sent, key=lambda each: each.at):
        line = lines.setdefault(each.service, Line(each.service))
        line.requests += 1
        line.answers[each.answer] += 1
        by_key[each.service, each.key, each.what].append(each)
    for (service, key, _), group in by_key.items():
        line, entry = lines[service], ledger.get(key)
        again = len(group) - 1
        recorded = sum(_was_recorded(each, entry) for each in group[1:])
        retries = min(again - recorded, _failures_tried_again(entry))
        line.recorded += recorded
        line.retries += retries
        line.repeated += again - recorded - retries
    for effect in effects:
        lines.setdefault(effect.service, Line(effect.service)).effects[effect.kind] += 1
    return list(lines.values())


def _was_recorded(request: Sent, entry: Entry | None) -> bool:
    """Whether the ledger had the result when this request came. Reads store no result there, by design."""
    if entry is None or entry.effect == "read" or entry.state not in DONE or entry.settled_at is None:
        return False
    return request.at > entry.settled_at


def _failures_tried_again(entry: Entry | None) -> int:
    if entry is None:
        return 0
    return entry.failures if entry.state in DONE else max(0, entry.failures - 1)


def doubled(effects: Iterable[EffectRow]) -> list[str]:
    """Keys with more than one effect of the same kind."""
    counts = Counter((effect.service, effect.kind, effect.key) for effect in effects)
    return [key for (_, _, key), number in counts.items() if number > 1]


def unmatched(effects: Iterable[EffectRow], entries: Iterable[Entry]) -> list[str]:
    """Keys on which the ledger and the hospital disagree: only one of them has the effect."""
    outside = {effect.key for effect in effects if not effect.kind.startswith(("cancel", "retraction"))}
    acts = [entry for entry in entries if entry.kind == "tool" and entry.effect != "read"]
    inside = {entry.key for entry in acts if entry.state in DONE}
    open_ends = {entry.key for entry in acts if entry.state is State.UNKNOWN}
    return sorted((outside ^ inside) - open_ends)
