"""The saga: an undo is registered before its effect starts. Unwinding runs the undos in reverse, one after another.

Each undo is idempotent and retried. An undo that keeps failing is recorded with its context and does not stop the rest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from temporalio.exceptions import ActivityError

from holdfast.contracts.run import UndoRecord
from holdfast.contracts.tool_call import UndoOutcome, UndoStatus

RunUndo = Callable[[UndoRecord], Awaitable[UndoOutcome]]


async def unwind(records: list[UndoRecord], run: RunUndo, changed: Callable[[], None]) -> None:
    """Undoes the registered records, newest first, and writes into each how its undo ended."""
    for record in reversed(records):
        if record.status is not UndoStatus.REGISTERED:
            continue
        try:
            outcome = await run(record)
        except ActivityError as error:
            # Its own deadline passed: the undo stays owed, and must not delay the next one.
            outcome = UndoOutcome(status=UndoStatus.FAILED, note=f"gave up: {error.cause or error}")
        record.status, record.note = outcome.status, outcome.note
        changed()
