"""What is written when a run ends: its result, and a letter for everything that it could not do."""

from __future__ import annotations

from typing import Any

import pytest

from activities.runs import RunRecords, letters_of
from holdfast.contracts.data import Json
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import Pending, RunEnd, RunOutcome, RunResult, UndoRecord
from holdfast.contracts.tool_call import UndoStatus
from holdfast.recovery.dead_letters import DeadLetter, DeadLetters, LetterKind, LetterState
from holdfast.reliability.crash_points import Point
from holdfast.reliability.ledger import Entry, Settled, State
from holdfast.state.runs import Runs
from tests.integration.activities.conftest import Process

BASE = "wf/0123456789ab"


def entry(seq: int | str, state: State, kind: str = "tool", effect: Effect = Effect.MANUAL, **more: Any) -> Entry:
    settled = None if state in (State.RESERVED, State.UNKNOWN) else Settled(state)
    return Entry(
        **{
            "key": f"{BASE}/{seq}",
            "key_base": BASE,
            "seq": int(str(seq)[0]),
            "kind": kind,
            "name": "send",
            "version": "1",
            "service": "mail",
            "effect": effect,
            "agent": "a",
            "arguments": {"n": 1},
            "state": state,
            "attempt": 2,
            "failures": 1,
            "worker": "w",
            "settled": settled,
            "error": "",
            "log": [{"at": 1.0, "worker": "w", "error": "timeout: no answer"}],
            "reserved_at": 1.0,
            "settled_at": None,
        }
        | more
    )


def end(outcome: RunOutcome, input: Json | None = None, **result: Any) -> RunEnd:
    return RunEnd(result=RunResult(outcome=outcome, agent="a", key_base=BASE, **result), input=input)


def letters(of: RunEnd, *entries: Entry, held: list[DeadLetter] | None = None) -> list[DeadLetter]:
    return letters_of(of, "wf", list(entries), "k", held or [])


PENDING = [Pending(step="tell", role="nurse", what="no answer", key=f"{BASE}/1")]


def test_a_completed_run_has_none() -> None:
    assert letters(end(RunOutcome.COMPLETED), entry(1, State.DONE)) == []


def test_a_pending_step_has_one_with_its_attempts() -> None:
    (made,) = letters(end(RunOutcome.PARTIAL, pending=PENDING), entry(1, State.FAILED))
    assert (made.kind, made.key, made.subject, made.role, made.cause) == (
        "call",
        f"{BASE}/1",
        "send",
        "nurse",
        "no answer",
    )
    assert made.details["attempts"] == [{"at": 1.0, "worker": "w", "error": "timeout: no answer", "key": f"{BASE}/1"}]
    assert (made.details["seq"], made.details["arguments"]) == (1, {"n": 1})


def test_a_pending_step_that_was_never_called_has_one_too() -> None:
    steps = [Pending(step="tell", role="nurse", what="not done"), Pending(step="bill", role="", what="not done")]
    made = letters(end(RunOutcome.PARTIAL, pending=steps))
    assert [(each.subject, each.key) for each in made] == [("tell", ""), ("bill", "")]
    assert made[0].id != made[1].id


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ([entry(1, State.UNKNOWN)], 1),
        ([entry(1, State.RESERVED)], 1),
        ([entry(1, State.FAILED)], 0),
        ([entry(1, State.COMPENSATED)], 0),
        ([entry(1, State.UNKNOWN), entry("1/undo", State.DONE, "undo")], 0),
        ([entry(1, State.FAILED), entry("1/fb-1", State.UNKNOWN)], 1),
    ],
    ids=["unknown", "cut off", "did not happen", "undone", "nothing to undo", "a stand-in is unknown"],
)
def test_of_a_run_that_was_unwound_only_what_may_have_happened_needs_a_person(rows: list[Entry], count: int) -> None:
    assert len(letters(end(RunOutcome.CANCELLED, pending=PENDING), *rows)) == count


def test_a_compensation_that_failed_has_one() -> None:
    undone = [
        UndoRecord(seq=1, tool="send", status=UndoStatus.UNDONE),
        UndoRecord(seq=2, tool="book", status=UndoStatus.FAILED, note="desk is closed", arguments={"n": 2}),
    ]
    (made,) = letters(end(RunOutcome.CANCELLED, undone=undone), entry(1, State.COMPENSATED), entry(2, State.DONE))
    assert (made.kind, made.key, made.subject, made.cause) == ("undo", f"{BASE}/2/undo", "book", "desk is closed")
    assert (made.details["seq"], made.details["arguments"]) == (2, {"n": 2})


def test_a_failed_run_has_one_with_its_input_and_every_key() -> None:
    (made,) = letters(end(RunOutcome.FAILED, {"what": "x"}, reason="no money"), entry(1, State.DONE))
    assert (made.kind, made.subject, made.cause, made.key_base) == ("run", "a", "no money", BASE)
    assert made.details["input"] == {"what": "x"}
    assert (made.details["request_key"], made.details["tries"], made.details["keys"]) == ("k", [BASE], [f"{BASE}/1"])


@pytest.mark.parametrize("outcome", [RunOutcome.FAILED, RunOutcome.CANCELLED, RunOutcome.REJECTED])
def test_a_replay_that_ends_badly_keeps_the_first_letter_and_input(outcome: RunOutcome) -> None:
    (first,) = letters(end(RunOutcome.FAILED, {"what": "x"}, reason="no money"))
    held = first._replace(state=LetterState.REPLAYING, workflow_id="wf~1")
    again = RunEnd(result=RunResult(outcome=outcome, agent="a", key_base="wf~1/fff", reason="again"))
    (made,) = letters_of(again, "wf~1", [], "k~1", [held])
    assert (made.id, made.cause, made.key_base) == (first.id, "again", "wf~1/fff")
    assert (made.details["input"], made.details["tries"]) == ({"what": "x"}, [BASE, "wf~1/fff"])


async def test_a_crash_between_letters_and_result_doubles_nothing(process: Process) -> None:
    records = RunRecords(process.runtime)
    of = end(RunOutcome.FAILED, {"what": "x"}, reason="no money")
    for point in (Point.LETTERS_WRITTEN, Point.END_RECORDED):
        await process.dies(point, records.record_end, of)
    await process.run(records.record_end, of)
    (letter,) = await DeadLetters(process.runtime.db).find()
    assert (letter.kind, letter.state) == (LetterKind.RUN, "open")
    run = await Runs(process.runtime.db).by_workflow(letter.workflow_id)
    assert run is not None
    assert run.outcome == "failed"


async def test_a_run_that_was_reset_and_ends_well_closes_its_letters(process: Process) -> None:
    records = RunRecords(process.runtime)
    failed = [UndoRecord(seq=1, tool="book", status=UndoStatus.FAILED, note="closed")]
    await process.run(records.record_end, end(RunOutcome.FAILED, {}, undone=failed))
    assert len(await DeadLetters(process.runtime.db).find(state="open")) == 2
    await process.run(records.record_end, end(RunOutcome.COMPLETED))
    found = await DeadLetters(process.runtime.db).find()
    assert [(each.state, "ended completed" in each.note) for each in found] == [("replayed", True)] * 2


async def test_an_owed_compensation_comes_back_when_the_run_that_built_on_it_ends_badly(process: Process) -> None:
    letters, records = DeadLetters(process.runtime.db), RunRecords(process.runtime)
    owed = DeadLetter(
        "undo-x", "undo", "open", "a", "default", "first", "first/base", "first/base/1/undo", "t", "", "c", "{}"
    )
    await letters.write([owed])
    workflow_id = "test"  # as the activity environment of the SDK names it
    assert await letters.hand_over(owed, workflow_id, {}, "")
    await process.run(records.record_end, end(RunOutcome.CANCELLED))
    found = await letters.get("undo-x")
    assert found is not None
    assert (found.state, found.workflow_id) == ("open", "first")
