"""Every activity heartbeats by itself, so that a dead worker is noticed in seconds and nobody has to remember it.

Each beat carries the position that the activity has told (`advance`), so a long one resumes there on another worker.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

from temporalio import activity
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor

from holdfast.reliability import lease

_position: ContextVar[list[Any] | None] = ContextVar("position", default=None)
"""What the beats of this activity carry: nothing, or one position."""


def position() -> Any:
    """Where the attempt before this one got to; None when it told nothing, or outside of an activity."""
    told = _position.get()
    return told[-1] if told else None


def advance(position: Any) -> None:
    """Tells how far the activity has come: JSON data. The server hears at once; from a thread, with the next beat."""
    told = _position.get()
    if told is None:
        return
    told[:] = [position]
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return  # a sync tool's thread, where Temporal cannot be told
    activity.heartbeat(position)


class HeartbeatInterceptor(Interceptor):
    """Beats four times per heartbeat timeout while the activity runs. Without that timeout it leaves it alone."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        return _Beating(super().intercept_activity(next))


class _Beating(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        timeout = activity.info().heartbeat_timeout
        if not timeout:
            return await self.next.execute_activity(input)
        loop = asyncio.get_running_loop()
        interval = timeout.total_seconds() / 4
        held = lease.Lease(timeout.total_seconds())
        lease.current.set(held)
        told = list(activity.info().heartbeat_details)[-1:]
        _position.set(told)

        def beat() -> None:
            nonlocal timer
            held.renew()
            activity.heartbeat(*told)
            timer = loop.call_later(interval, beat)

        timer = loop.call_later(interval, beat)
        try:
            return await self.next.execute_activity(input)
        finally:
            timer.cancel()
