"""A discharge that is reset to before its orders were undone must not build on what the hospital has cancelled."""

from __future__ import annotations

import asyncio
import subprocess
from uuid import uuid4

import pytest
from temporalio.client import WorkflowFailureError

from holdfast.contracts.recovery import RepairResult, Sweep, Swept
from holdfast.contracts.run import RunOutcome, RunStatus
from tests.fixtures.temporal import binary
from tests.fixtures.ward import PATIENCE_S, Run, Ward


async def sweep(ward: Ward) -> None:
    """Undoes what terminated runs have left, as the schedule does every five minutes."""
    swept = await ward.client.execute_workflow(
        "OrphanSweep", Sweep(grace_s=0), id=f"sweep-{uuid4().hex[:8]}", task_queue="holdfast", result_type=Swept
    )
    for each in swept.found:
        assert (await ward.client.get_workflow_handle(each, result_type=RepairResult).result()).ok


async def newest_task(run: Run) -> str:
    """The event to which `temporal workflow reset` is told to go back."""
    events = (await run.handle.fetch_history()).events
    return str(max(e.event_id for e in events if e.HasField("workflow_task_completed_event_attributes")))


async def reset(run: Run, event: str) -> None:
    where = ("--workflow-id", run.id, "--event-id", event, "--reason", "test")
    command = [binary("temporal"), "workflow", "reset", *where, "--address", run.ward.stack.temporal_address]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


def asks_anew(now: RunStatus) -> bool:
    asked = {each.id for each in now.approvals if each.kind == "tool"}
    return len(asked) == 2 and asked.isdisjoint({"a7", "a8"})


@pytest.mark.parametrize("how", ["cancelled", "terminated"])
async def test_what_the_hospital_has_cancelled_is_ordered_again_before_the_run_completes(ward: Ward, how: str) -> None:
    run = await ward.admit()
    await run.until_messages_wait()
    event = await newest_task(run)
    if how == "cancelled":
        await run.handle.cancel()
        with pytest.raises(WorkflowFailureError):
            await run.ended()
    else:
        await run.handle.terminate("by hand")
        await sweep(ward)
    ordered, booked = [("order", "4"), ("cancel-order", "4")], [("book", "5"), ("cancel-booking", "5")]
    assert (run.effects("pharmacy"), run.effects("appointments")) == (ordered, booked)

    await reset(run, event)
    for old in ("a7", "a8"):  # at once, as shown before: whether the run has looked by then or not
        await run.handle.signal("decide", {"approval_id": old, "verdict": "approve", "approver": "dr.lee"})
    now = await run.until(lambda now: now.outcome is not None or asks_anew(now))
    assert now.outcome is None, "it has ended without a word to the physician"
    assert run.effects("messages") == []
    assert any("no longer standing: #4 order_medication, #5 book_appointment" in note for note in now.notes)
    await run.approve()
    result = await run.ended()

    assert (result.outcome, result.percent, result.pending) == (RunOutcome.COMPLETED, 100, [])
    assert run.effects("pharmacy") == [*ordered, ("order", "9")]
    assert run.effects("appointments") == [*booked, ("book", "10")]
    assert sorted(run.effects("messages")) == [("message", "11"), ("message", "12")]
    assert (await run.stored()).outcome is RunOutcome.COMPLETED
