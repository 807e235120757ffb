"""The saga: an undo is registered before its effect starts. Unwinding runs the undos in reverse, one after another.

Each undo is idempotent and retried. An undo that keeps failing is recorded with its context and does not stop the rest.
"""

from __future__ import annotations

from temporalio.exceptions import ActivityError

from holdfast.contracts.run import Phase
from holdfast.contracts.tool_call import UndoOutcome, UndoStatus
from workflows.run import Run
from workflows.tool_calls import ToolCalls


async def unwind(run: Run, tool_calls: ToolCalls) -> None:
    """Undoes what the run did, newest first, and asks the services about calls that nothing has undone."""
    state = run.state
    if state.was_reset:
        await tool_calls.own_all()
    if state.saga:
        run.enter(Phase.COMPENSATING)
    for record in reversed(state.saga):
        if record.status is not UndoStatus.REGISTERED:
            continue
        try:
            outcome = await tool_calls.undo(record)
        except ActivityError as error:
            # Its own deadline passed: the undo stays owed, and must not delay the next one.
            outcome = UndoOutcome(status=UndoStatus.FAILED, note=f"gave up: {error.cause or error}")
        record.status, record.note = outcome.status, outcome.note
        run.changed()
    if state.seq:
        run.note(*await tool_calls.ask_about_doubts())
