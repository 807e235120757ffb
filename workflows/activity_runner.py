"""How a workflow runs its activities: one retry policy for all, and a durable timer when an activity asks to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import datetime, timedelta
from typing import Any, TypeVar

from pydantic import ValidationError
from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError, TimeoutError

from holdfast.contracts.turn import MayWait, Usage, Wait

HEARTBEAT = timedelta(seconds=3)
"""Temporal notices a dead worker after this long. Activities heartbeat four times as often
(`holdfast.reliability.heartbeat`)."""
# Attempts are unlimited: the ledger counts real failures, and each failure carries its own delay. This policy only
# paces the retry after a worker crash, which has no reason to be slow.
RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=500), backoff_coefficient=1.0)
GRACE_S = 30.0
"""Seconds that an activity gets beyond the time limit that it enforces itself."""
UNDO_DEADLINE_S = 3600.0
ASK_DEADLINE_S = 900.0
"""Time for a service to say whether a call happened, over all attempts."""

P = TypeVar("P")
T = TypeVar("T")


class Host:
    """What an `ActivityRunner` tells the workflow that it works for, and asks it. The defaults show nothing."""

    stops = False
    """A cancelled task starts no activity and does not wait. False, as in a repair: the task goes on to its end."""

    def parked(self, wait: Wait | None) -> None:
        """An activity has asked to wait; None: a wait is over."""

    def went_on(self) -> None:
        """An activity has returned a result that is no wait."""

    def places(self) -> int:
        """How many tool calls may run at a time; 0: any number."""
        return 0


class ActivityRunner:
    """Runs the activities of one workflow. `open` counts those in flight: a run may continue as new only at 0."""

    def __init__(self, host: Host) -> None:
        self.open = 0
        self.waits: list[Wait] = []
        """The waits that calls are sleeping through now."""
        self._host = host
        self._window: asyncio.Semaphore | None = None

    def _stops_here(self) -> bool:
        return self._host.stops and leaving()

    def _place(self) -> AbstractAsyncContextManager[None]:
        """One of the places for running tool calls."""
        if self._window is None and (places := self._host.places()):
            self._window = asyncio.Semaphore(places)
        return self._window or nullcontext()

    async def run(
        self,
        activity: Callable[[Any, P], Awaitable[T]],
        request: P,
        *,
        summary: str,
        timeout_s: float = 0.0,
        deadline_s: float | None = None,
        settle: bool = True,
        deferrable: bool = False,
        patience: datetime | None = None,
        queue: str = "",
        begins: Callable[[], None] | None = None,
        waited: Callable[[T], None] = lambda _: None,
    ) -> T:
        """Runs an activity to its result, and sleeps whenever the activity asks to wait.

        timeout_s: time for one attempt. deadline_s: time for all attempts and the waits between them; no wait goes
        beyond it. settle: after a cancel, wait until the activity has reported how it ended; without it, return at
        once. deferrable: return a wait for a service that is down to the caller, which defers the call. patience: no
        wait goes beyond this time either. queue: the stage whose workers run the activity. begins: given for a tool
        call, which needs a place: called each time the call gets one, before the activity is scheduled. The call holds
        the place only while the activity is open, so a sleeping call blocks no other. The deadline counts from the
        first place. waited: called with each result that asks to wait.
        The result still has its `wait` when the call was given up or is to be deferred.
        Raises ActivityError when the activity gave up or was cancelled. With `Host.stops`, raises CancelledError in a
        cancelled task instead of waiting or starting: an activity that was allowed to end swallows the cancellation.
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
                    outcome = await workflow.execute_activity_method(
                        activity,
                        request,
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
            wait = outcome.wait if isinstance(outcome, MayWait) else None
            if wait is None:
                self._host.went_on()
            else:
                waited(outcome)
            if wait and self._stops_here():
                raise asyncio.CancelledError
            latest = min((each for each in (end, patience) if each), default=None)
            if wait is None or (deferrable and wait.service) or (latest and wait.until > latest):
                return outcome
            self.waits.append(wait)
            self._host.parked(wait)
            try:
                # A durable timer: the wait uses no worker and no retry.
                await workflow.sleep(max(wait.until - workflow.now(), timedelta(milliseconds=100)))
            finally:
                self.waits.remove(wait)
            self._host.parked(None)


def leaving() -> bool:
    """Whether this task was cancelled: the run is ending, and only settles what is in flight."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def why(error: ActivityError) -> str:
    """What went wrong, without Temporal's own words around it. After a timeout: what the last attempt said."""
    cause = error.cause
    if isinstance(cause, TimeoutError) and isinstance(cause.cause, ApplicationError):
        cause = cause.cause
    return str(getattr(cause, "message", None) or cause or error)


def spent_by(error: ActivityError) -> Usage | None:
    """The model usage of a turn that failed for good; None when its error does not carry it."""
    details = error.cause.details if isinstance(error.cause, ApplicationError) else ()
    try:
        return Usage.model_validate(details[0]) if details else None
    except ValidationError:
        return None
