"""What a repair writes: a run's stored result brought up to date, once, however often it is told."""

from __future__ import annotations

import asyncio

from activities.recovery import Repairs
from activities.runs import RunRecords
from holdfast.contracts.profile import Effect
from holdfast.contracts.recovery import Action, ActionEnd, Repair, RepairEnd
from holdfast.contracts.run import Pending, RunOutcome, RunResult, StepState, StepStatus, UndoRecord
from holdfast.contracts.tool_call import UndoStatus
from holdfast.recovery.dead_letters import DeadLetters, LetterKind
from holdfast.recovery.model import amended
from holdfast.reliability.crash_points import Point
from holdfast.reliability.ledger import tool_call
from holdfast.state.runs import Runs
from tests.integration.activities.conftest import Process

BASE = "wf/0123456789ab"


def replayed(seq: int, *, ok: bool = True, words: str = "order replayed") -> ActionEnd:
    return ActionEnd(action=Action(do="call", key=f"{BASE}/{seq}", seq=seq, tool="order"), ok=ok, words=words)


PARTIAL = RunResult(
    outcome=RunOutcome.PARTIAL,
    reason="pending: pharmacy (pharmacist), visit (desk)",
    key_base=BASE,
    percent=33,
    steps=[
        StepState(name="record", status=StepStatus.DONE),
        StepState(name="pharmacy", status=StepStatus.PENDING, seq=1),
        StepState(name="visit", status=StepStatus.PENDING, seq=2),
    ],
    pending=[
        Pending(step="pharmacy", role="pharmacist", what="closed", key=f"{BASE}/1"),
        Pending(step="visit", role="desk", what="closed", key=f"{BASE}/2"),
    ],
)


def test_a_run_is_complete_when_nothing_is_pending_any_more() -> None:
    one = amended(PARTIAL, [replayed(1)])
    assert (one.outcome, one.reason, one.percent) == (RunOutcome.PARTIAL, "66 % complete, awaiting visit (desk)", 66)
    both = amended(one, [replayed(2)])
    assert (both.outcome, both.reason, both.percent, both.pending) == (RunOutcome.COMPLETED, "", 100, [])
    assert amended(both, [replayed(2)]) == both
    assert PARTIAL.pending[0].what == "closed"


def test_a_replay_that_failed_leaves_the_step_pending_with_the_new_cause() -> None:
    after = amended(PARTIAL, [replayed(1, ok=False, words="still closed")])
    assert (after.outcome, after.pending[0].what, after.percent) == (RunOutcome.PARTIAL, "still closed", 33)


def test_an_unwound_run_does_not_become_complete() -> None:
    cancelled = PARTIAL.model_copy(update={"outcome": RunOutcome.CANCELLED, "reason": "cancelled"})
    after = amended(cancelled, [replayed(1), replayed(2)])
    assert (after.outcome, after.reason) == (RunOutcome.CANCELLED, "cancelled")


def test_an_undo_by_hand_counts_like_one_that_worked() -> None:
    owed = UndoRecord(seq=1, tool="order", step="pharmacy", status=UndoStatus.FAILED, note="closed")
    cancelled = PARTIAL.model_copy(update={"outcome": RunOutcome.CANCELLED, "undone": [owed]})
    by_hand = Action(do="settle", key=f"{BASE}/1/undo", seq=1, tool="order", happened=True)
    end = ActionEnd(action=by_hand, ok=True, words="settled by ph.kim", undo=UndoStatus.UNDONE)
    after = amended(cancelled, [end])
    assert (after.undone[0].status, after.steps[1].status) == (UndoStatus.UNDONE, StepStatus.UNDONE)


async def test_the_end_of_a_swept_run_is_recorded_once_over_crashes(process: Process) -> None:
    repairs = Repairs(process.runtime, RunRecords(process.runtime))
    await process.runtime.ledger.reserve(tool_call(f"{BASE}/1", BASE, "mail", Effect.MANUAL, {}, seq=1, agent="a"))
    end = RepairEnd(repair=Repair(workflow_id="wf", key_base=BASE, agent="a"))
    for point in (Point.LETTERS_WRITTEN, Point.END_RECORDED):
        await process.dies(point, repairs.record_orphan, end)
    result = await process.run(repairs.record_orphan, end)
    assert (result.ok, result.outcome) == (False, RunOutcome.CANCELLED)
    (letter,) = await DeadLetters(process.runtime.db).find()
    assert (letter.kind, letter.workflow_id, letter.key) == (LetterKind.CALL, "wf", f"{BASE}/1")
    (run,) = await Runs(process.runtime.db).recent(10)
    assert (run.workflow_id, run.outcome) == ("wf", "cancelled")


async def test_two_repairs_of_one_run_at_once_both_count(process: Process) -> None:
    repairs = Repairs(process.runtime, RunRecords(process.runtime))
    await Runs(process.runtime.db).finish("wf", "partial", PARTIAL.model_dump_json())
    of = Repair(workflow_id="wf", key_base=BASE, agent="a")
    ends = [RepairEnd(repair=of, ends=[replayed(seq)]) for seq in (1, 2)]
    await asyncio.gather(*(process.run(repairs.record_repair, end) for end in ends))
    run = await Runs(process.runtime.db).by_workflow("wf")
    assert run is not None
    assert (run.outcome, RunResult.model_validate_json(run.result or "").pending) == ("completed", [])
