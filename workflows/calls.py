"""How the workflow calls its activities: one policy for all, and patience with those that answer "not before T"."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import datetime, timedelta
from typing import Any, TypeVar

from pydantic import ValidationError
from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError, TimeoutError

from holdfast.contracts import Usage, Wait

HEARTBEAT = timedelta(seconds=3)
"""A dead worker is noticed after this long. Activities beat four times as often (`holdfast.reliability.heartbeat`)."""
# Attempts are unlimited: real failures are counted by the ledger and carry their own delay. What this policy paces is
# being tried again after a crash, which is no reason to wait.
RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=500), backoff_coefficient=1.0)
GRACE_S = 30.0
"""Seconds that an activity gets beyond the limit it enforces itself."""
UNDO_DEADLINE_S = 3600.0
ASK_DEADLINE_S = 900.0
"""For a service to say whether a call happened."""

T = TypeVar("T")
Parked = Callable[[Wait | None], None]
"""Told when an activity asks to wait, and with None when the wait is over."""


class Calls:
    """The activities of one run. `open` counts those under way: only at 0 may the run continue as new."""

    def __init__(
        self,
        parked: Parked,
        went_on: Callable[[], None] = lambda: None,
        places: Callable[[], int] = lambda: 0,
        stops: bool = False,
    ) -> None:
        """went_on: told of every activity that has come to a result. places: how many tool calls may be at work at a
        time; 0: any number. stops: in a task that was cancelled nothing more begins or waits. A repair goes on to its
        end instead.
        """
        self.open = 0
        self.waits: list[Wait] = []
        """What calls are asleep for."""
        self._parked = parked
        self._went_on = went_on
        self._places = places
        self._stops = stops
        self._window: asyncio.Semaphore | None = None

    def _stops_here(self) -> bool:
        return self._stops and leaving() and workflow.patched("cancel-ends")

    def _place(self) -> AbstractAsyncContextManager[None]:
        """A place among the tool calls that are at work."""
        if self._window is None and (places := self._places()):
            self._window = asyncio.Semaphore(places)
        return self._window or nullcontext()

    async def run(
        self,
        name: str,
        request: Any,
        result: type[T],
        *,
        summary: str,
        timeout_s: float = 0.0,
        deadline_s: float | None = None,
        settle: bool = True,
        put_off: bool = False,
        patience: datetime | None = None,
        queue: str = "",
        begins: Callable[[], None] | None = None,
        waited: Callable[[T], None] = lambda _: None,
    ) -> T:
        """Runs an activity to its result, sleeping whenever it asks to wait.

        timeout_s: what it needs for one attempt. deadline_s: over all attempts and the waits between them; no wait goes
        beyond it. settle: a cancelled call is waited for until it has said how it ended; without, it is left alone at
        once. put_off: a wait for a service that is down is the caller's business. patience: no wait goes beyond it
        either. queue: the stage whose workers do it. begins: of a tool call, which needs a place: called each time that
        it has one, before the activity is scheduled. It has the place only while the activity is open, so a call that
        sleeps holds up no other. The deadline counts from the first place. waited: told of each result that is a wait.
        The result still holds its `wait` when it was given up or put off.
        Raises ActivityError when the activity gave up or was cancelled. With `stops`, raises CancelledError in a
        cancelled task instead of waiting or beginning anything: an activity that was let end swallows the cancellation.
        """
        how = workflow.ActivityCancellationType
        place = self._place() if begins else nullcontext()
        end = None
        while True:
            if self._stops_here():
                raise asyncio.CancelledError
            async with place:
                if begins:
                    begins()
                if deadline_s is not None and end is None:
                    end = workflow.now() + timedelta(seconds=deadline_s)
                self.open += 1
                try:
                    outcome = await workflow.execute_activity(
                        name,
                        request,
                        result_type=result,
                        task_queue=f"{workflow.info().task_queue}.{queue}" if queue else None,
                        start_to_close_timeout=timedelta(seconds=timeout_s + GRACE_S),
                        schedule_to_close_timeout=max(end - workflow.now(), timedelta(seconds=1)) if end else None,
                        heartbeat_timeout=HEARTBEAT,
                        retry_policy=RETRY,
                        summary=summary,
                        cancellation_type=how.WAIT_CANCELLATION_COMPLETED if settle else how.TRY_CANCEL,
                    )
                finally:
                    self.open -= 1
            wait: Wait | None = getattr(outcome, "wait", None)
            if wait is None:
                self._went_on()
            else:
                waited(outcome)
            if wait and self._stops_here():
                raise asyncio.CancelledError
            latest = min((each for each in (end, patience) if each), default=None)
            if wait is None or (put_off and wait.service) or (latest and wait.until > latest):
                return outcome
            self.waits.append(wait)
            self._parked(wait)
            try:
                # Waiting is a durable timer, not a worker's time, and uses up no retry.
                await workflow.sleep(max(wait.until - workflow.now(), timedelta(milliseconds=100)))
            finally:
                self.waits.remove(wait)
            self._parked(None)


def leaving() -> bool:
    """Whether this task was cancelled: the run ends, and what is under way is only settled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def why(error: ActivityError) -> str:
    """What was wrong, without Temporal's own words around it: when time was up, what the last attempt said."""
    cause = error.cause
    if isinstance(cause, TimeoutError) and isinstance(cause.cause, ApplicationError):
        cause = cause.cause
    return str(getattr(cause, "message", None) or cause or error)


def spent_by(error: ActivityError) -> Usage | None:
    """What a turn had used that failed for good; None when it could not say so."""
    details = error.cause.details if isinstance(error.cause, ApplicationError) else ()
    try:
        return Usage.model_validate(details[0]) if details else None
    except ValidationError:
        return None
