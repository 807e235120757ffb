"""Heartbeats for every activity, so that the server notices a dead worker in seconds without code in the activity.

Each heartbeat carries the position that the activity reported with `advance`, so that a long activity resumes there on
another worker.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

from temporalio import activity
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor

from holdfast.authoring.tools import as_position
from holdfast.reliability import lease

_position: ContextVar[list[Any] | None] = ContextVar("position", default=None)
"""The heartbeat details of this activity: empty, or one `[key of the call, position]`."""


def position(key: str) -> Any:
    """Returns the position that the call with this key reported in this activity, or None.

    A fallback call has its own key, and so its own position.
    """
    details = _position.get()
    return details[-1][1] if details and details[-1][0] == key else None


def resume(key: str, position: Any) -> None:
    """Sets the position that an earlier activity reported, unless this one has reported its own."""
    details = _position.get()
    if details is None:
        _position.set(details := [])  # no heartbeat carries it: it holds for this attempt only
    if position is not None and not (details and details[-1][0] == key):
        details[:] = [[key, position]]


def advance(key: str, position: Any) -> None:
    """Reports the call's position, as JSON data: to the server at once, from a thread with the next heartbeat.

    Raises ValueError when the position is not JSON data.
    """
    details, position = _position.get(), as_position(position)
    if details is None:
        return
    details[:] = [[key, position]]
    if not activity.in_activity() or not activity.info().heartbeat_timeout:
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return  # the thread of a sync tool, which cannot send a heartbeat
    activity.heartbeat(*details)


class HeartbeatInterceptor(Interceptor):
    """Heartbeats four times per heartbeat timeout while the activity runs. Does nothing without that timeout."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        return _HeartbeatInbound(super().intercept_activity(next))


class _HeartbeatInbound(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        timeout = activity.info().heartbeat_timeout
        if not timeout:
            return await self.next.execute_activity(input)
        loop = asyncio.get_running_loop()
        interval = timeout.total_seconds() / 4
        held = lease.Lease(timeout.total_seconds())
        lease.current.set(held)
        details = [each for each in activity.info().heartbeat_details[-1:] if isinstance(each, list) and len(each) == 2]
        _position.set(details)

        def beat() -> None:
            nonlocal timer
            held.renew()
            activity.heartbeat(*details)
            timer = loop.call_later(interval, beat)

        timer = loop.call_later(interval, beat)
        try:
            return await self.next.execute_activity(input)
        finally:
            timer.cancel()
