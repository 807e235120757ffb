"""The saga: an undo is registered before its effect starts, and on unwinding they run in reverse, one after another.

Each is idempotent and retried. One that keeps failing is recorded with its context and does not stop the others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from temporalio.exceptions import ActivityError

from holdfast.contracts import UndoOutcome, UndoRecord, UndoStatus

RunUndo = Callable[[UndoRecord], Awaitable[UndoOutcome]]


async def unwind(records: list[UndoRecord], run: RunUndo, changed: Callable[[], None]) -> None:
    """Undoes what the records name, newest first, and writes how each ended into it."""
    for record in reversed(records):
        if record.status is not UndoStatus.REGISTERED:
            continue
        try:
            outcome = await run(record)
        except ActivityError as error:
            # Its own deadline passed: the undo stays owed, and the next one is as urgent as this was.
            outcome = UndoOutcome(status=UndoStatus.FAILED, note=f"gave up: {error.cause or error}")
        record.status, record.note = outcome.status, outcome.note
        changed()
