"""Runs that ended without a recorded outcome, such as terminated ones: what they left, and what undoes it."""

from __future__ import annotations

from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from holdfast.contracts.tool_call import key_base
from holdfast.engine.executions import PAUSE, PROBLEMS, Execution, describe
from holdfast.recovery.model import left_behind, unwind_id
from holdfast.reliability.ledger import Ledger
from holdfast.settings import settings
from holdfast.state.database import StoreUnavailable
from holdfast.state.opening import open_database

SWEEP = "the sweep undoes what it did within some minutes, `uv run starter.py orphans --fix` does it now"


async def words(client: Client, execution: Execution) -> str:
    """Describes a run that has ended without a recorded outcome. Asks the store and the server, no worker."""
    base = key_base(execution.id, execution.first_run_id)
    said = f"the run is {execution.status.replace('_', ' ')} and recorded no end"
    try:
        db = await open_database(settings().store_url)
        try:
            rows = left_behind(base, await Ledger(db, "").entries(base))
        finally:
            await db.close()
    except StoreUnavailable as error:
        return f"{said}: {SWEEP} ({error})"
    if not rows:
        return f"{said}; it left nothing to undo"
    who = SWEEP
    try:
        if (await describe(client, unwind_id(base))).open:
            who = f"the workflow {unwind_id(base)} undoes what it did"
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
    return f"{said}: {who}. Left, the newest first: {', '.join(f'{row.name} #{row.seq}' for row in rows)}"


def note(execution: Execution, recorded: bool) -> str:
    """The note that `list` adds to a run's status, from visibility; empty for most runs."""
    if not execution.open:
        over = execution.status in ("terminated", "timed_out") and not recorded
        return f"{execution.status.replace('_', ' ')}; {SWEEP}" if over else ""
    if PROBLEMS in execution.attributes:
        return "its workflow task fails and is tried again; `status` says why"
    if PAUSE in execution.attributes and not execution.paused:
        return "an activity of it is paused; `status` says which, and how it goes on"
    return ""
