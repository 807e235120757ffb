"""The judge of the chaos program sees each kind of damage, and none where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.chaos.judge import Record, judge
from bench.sweep.cases import EFFECTS
from holdfast.contracts.run import Pending, RunOutcome, RunResult
from holdfast.dev.simulation.hospital import EffectRow
from holdfast.dev.simulation.scripted_model import CallRow
from holdfast.recovery.dead_letters import DeadLetter, LetterKind, LetterState
from holdfast.reliability.ledger import Entry, Settled, State

BASE = "discharge-1/abc"


def entry(seq: int, name: str, state: State = State.DONE, kind: str = "tool") -> Entry:
    settled = Settled(state) if state in (State.DONE, State.FAILED, State.COMPENSATED) else None
    return Entry(
        key=f"{BASE}/{seq}" if kind == "tool" else f"{BASE}/turn-{seq}",
        key_base=BASE,
        seq=seq,
        kind=kind,
        name=name,
        version="1",
        service="",
        effect="idempotent",
        agent="discharge",
        arguments={},
        state=state,
        attempt=1,
        failures=0,
        worker="w",
        settled=settled,
        error="",
        log=[],
        reserved_at=10.0,
        settled_at=11.0,
    )


def effect(kind: str, key: str) -> EffectRow:
    return EffectRow(id=0, at=10.5, service="", kind=kind, key=key, detail={})


def completed() -> Record:
    ledger = [entry(n, tool) for n, tool in enumerate(EFFECTS, 1)]
    return Record(
        workflow_id="discharge-1",
        status="COMPLETED",
        result=RunResult(outcome=RunOutcome.COMPLETED),
        ledger=[*ledger, entry(1, "turn-1", kind="model")],
        effects=[effect(words.effect, f"{BASE}/{n}") for n, words in enumerate(EFFECTS.values(), 1)],
        calls=[CallRow(1, f"{BASE}/turn-1", 10.0, 10.9, 1, 1)],
    )


def kinds(record: Record) -> set[str]:
    return {violation.kind for violation in judge(record)}


def test_a_run_as_it_should_be_has_no_violation() -> None:
    assert judge(completed()) == []


def test_an_unwound_run_has_no_violation() -> None:
    run = completed()
    undone = [replace(e, state=State.COMPENSATED) if e.name != "notify_patient" else e for e in run.ledger[:4]]
    extra = [
        effect(words.undo, f"{BASE}/{n}{words.undo_suffix}")
        for n, words in enumerate(EFFECTS.values(), 1)
        if words.undo
    ]
    result = RunResult(outcome=RunOutcome.CANCELLED)
    assert judge(replace(run, ledger=undone, calls=[], effects=run.effects + extra, result=result)) == []


@pytest.mark.parametrize("tool", EFFECTS)
def test_an_effect_that_happened_twice_under_a_key(tool: str) -> None:
    run = completed()
    n = list(EFFECTS).index(tool) + 1
    again = effect(EFFECTS[tool].effect, f"{BASE}/{n}")
    assert "doubled" in kinds(replace(run, effects=[*run.effects, again]))


def test_an_effect_that_happened_again_under_another_key() -> None:
    run = completed()
    again = replace(run, ledger=[*run.ledger, entry(9, "notify_patient")])
    assert kinds(replace(again, effects=[*run.effects, effect("message", f"{BASE}/9")])) == {"doubled"}


def test_an_effect_under_a_key_of_no_call() -> None:
    run = completed()
    assert kinds(replace(run, effects=[*run.effects, effect("order", f"{BASE}/77")])) == {"doubled"}


def test_a_completed_run_without_an_effect() -> None:
    run = completed()
    assert kinds(replace(run, effects=run.effects[1:])) == {"lost"}


def test_an_effect_that_stands_after_a_cancellation() -> None:
    assert "standing" in kinds(replace(completed(), result=RunResult(outcome=RunOutcome.CANCELLED)))


def test_a_call_in_doubt_that_people_hear_nothing_of() -> None:
    run = completed()
    ledger = [replace(e, state=State.UNKNOWN) if e.name == "notify_patient" else e for e in run.ledger]
    gone = replace(run, ledger=ledger, effects=run.effects[:3], result=RunResult(outcome=RunOutcome.CANCELLED))
    assert "disagreement" in kinds(gone)
    pending = [Pending(step="notify", role="", what="in doubt", key=f"{BASE}/4")]
    told = replace(gone, result=RunResult(outcome=RunOutcome.CANCELLED, pending=pending))
    assert "disagreement" not in kinds(told)


def test_a_call_in_doubt_whose_undo_found_nothing_is_settled() -> None:
    run = completed()
    ledger = [replace(e, state=State.UNKNOWN) if e.name == "notify_patient" else e for e in run.ledger]
    gone = replace(run, ledger=ledger, effects=run.effects[:3], result=RunResult(outcome=RunOutcome.CANCELLED))
    [call] = (e for e in ledger if e.name == "notify_patient")
    undo = replace(call, key=f"{call.key}/undo", kind="undo", state=State.DONE)
    assert "disagreement" not in kinds(replace(gone, ledger=[*ledger, undo]))
    assert "disagreement" in kinds(replace(gone, ledger=[*ledger, replace(undo, state=State.FAILED)]))


def test_an_undo_that_worked_and_whose_answers_were_lost_is_a_dead_letter() -> None:
    run = replace(completed(), result=RunResult(outcome=RunOutcome.CANCELLED))
    run = replace(run, effects=[*run.effects, effect("cancel-booking", f"{BASE}/2")])
    kind, state = LetterKind.UNDO, LetterState.OPEN
    letter = DeadLetter("undo-1", kind, state, "", "", run.workflow_id, BASE, f"{BASE}/2/undo", "", "", "502", "{}")
    booking = f"{BASE}/2 (book_appointment)"
    assert any(booking in each.words for each in judge(run))
    assert not any(booking in each.words for each in judge(replace(run, letters=[letter])))


def test_a_ledger_that_says_no_where_the_service_says_yes() -> None:
    run = completed()
    ledger = [replace(e, state=State.FAILED) if e.name == "order_medication" else e for e in run.ledger]
    assert kinds(replace(run, ledger=ledger)) == {"disagreement"}


def test_a_recorded_answer_that_was_paid_again() -> None:
    run = completed()
    assert kinds(replace(run, calls=[*run.calls, CallRow(2, f"{BASE}/turn-1", 12.0, 12.5, 1, 1)])) == {"paid again"}


def test_a_request_that_the_network_held_back_is_not_paid_again() -> None:
    run = completed()
    late = replace(run, calls=[*run.calls, CallRow(2, f"{BASE}/turn-1", 19.05, 19.5, 1, 1)])
    assert kinds(replace(late, released=[4.0, 19.0])) == set()
    assert kinds(replace(late, released=[4.0])) == {"paid again"}


def test_a_run_that_was_terminated_before_it_had_done_anything_needs_no_end() -> None:
    run = replace(completed(), result=None, status="TERMINATED")
    assert kinds(run) == {"stuck"}
    assert kinds(replace(run, ledger=[], effects=[], calls=[])) == set()


def test_a_run_without_an_end_a_failed_one_and_one_that_does_not_replay() -> None:
    run = completed()
    assert kinds(replace(run, result=None, status="RUNNING")) == {"stuck"}
    assert "failed" in kinds(replace(run, result=RunResult(outcome=RunOutcome.FAILED, reason="gone")))
    assert kinds(replace(run, replay_error="[TMPRL1100] Nondeterminism error")) == {"no replay"}
