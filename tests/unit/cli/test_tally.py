"""Requests are told apart: first, retried after a failure, repeated after a kill, repeated though recorded."""

from typing import Any

import pytest

from holdfast.cli.tally import Sent, count, doubled, unmatched
from holdfast.dev.simulation.hospital import EffectRow
from holdfast.reliability.ledger import Entry, State


def entry(state: State = State.DONE, failures: int = 0, effect: str = "idempotent", settled_at: float = 9.5) -> Entry:
    return Entry(
        key="k",
        key_base="wf/run",
        seq=1,
        kind="tool",
        name="t",
        version="1",
        service="pharmacy",
        effect=effect,
        agent="a",
        arguments=None,
        state=state,
        attempt=1,
        failures=failures,
        worker="w",
        settled=None,
        error="",
        log=[],
        reserved_at=0.0,
        settled_at=settled_at,
    )


def sent(*times: float) -> list[Sent]:
    return [Sent("pharmacy", "k", "POST /orders", at, "200") for at in times]


def effect(number: int, kind: str = "order", key: str = "k") -> EffectRow:
    return EffectRow(number, float(number), "pharmacy", kind, key, {})


@pytest.mark.parametrize(
    ("requests", "row", "retries", "repeated", "recorded"),
    [
        (sent(1), entry(), 0, 0, 0),
        (sent(1, 2, 3), entry(failures=2), 2, 0, 0),
        (sent(1, 2), entry(), 0, 1, 0),
        (sent(1, 2, 3), entry(failures=1), 1, 1, 0),
        (sent(1, 10), entry(), 0, 0, 1),
        (sent(1, 10), entry(effect="read"), 0, 1, 0),
        (sent(1, 2), entry(State.UNKNOWN, failures=1), 0, 1, 0),
        (sent(1, 2), None, 0, 1, 0),
    ],
)
def test_every_further_request_is_one_of_three(
    requests: list[Sent], row: Entry | None, retries: int, repeated: int, recorded: int
) -> None:
    (line,) = count(requests, [], [row] if row else [])
    assert (line.requests, line.retries, line.repeated, line.recorded) == (len(requests), retries, repeated, recorded)


@pytest.mark.parametrize(
    ("effects", "rows", "twice", "disputed"),
    [
        ([effect(1)], [entry()], [], []),
        ([effect(1), effect(2)], [entry()], ["k"], []),
        ([effect(1), effect(2, "cancel-order")], [entry(State.COMPENSATED)], [], []),
        ([effect(1)], [], [], ["k"]),
        ([], [entry()], [], ["k"]),
        ([effect(1)], [entry(State.UNKNOWN)], [], []),
    ],
)
def test_ledger_and_hospital_are_compared(effects: Any, rows: Any, twice: list[str], disputed: list[str]) -> None:
    assert doubled(effects) == twice
    assert unmatched(effects, rows) == disputed
