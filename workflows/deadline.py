"""The deadline of a run: the time that its agent may work. The clock stops while the run waits for a person."""

from __future__ import annotations

from temporalio import workflow

from holdfast.contracts.run import RunOutcome
from workflows.run import Run
from workflows.state import Ending


async def watch(run: Run) -> None:
    """Ends the run when its time is used up."""
    state, approvals = run.state, run.state.approvals
    while run.ending is None:
        await workflow.wait_condition(lambda: state.profile is not None and approvals.asked_since is None)
        assert state.profile is not None
        used = (workflow.now() - state.started).total_seconds() - approvals.waited_s
        left = state.profile.deadline_s - used
        if left <= 0:
            run.ending = Ending(RunOutcome.FAILED, f"deadline: {used:.0f} s are used up")
            return
        try:
            await workflow.wait_condition(
                lambda: approvals.asked_since is not None, timeout=left, timeout_summary="deadline"
            )
        except TimeoutError:
            continue
