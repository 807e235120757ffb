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
from holdfast.tools import as_position

_position: ContextVar[list[Any] | None] = ContextVar("position", default=None)
"""What the beats of this activity carry: nothing, or one position, with the key of its call."""


def position(key: str) -> Any:
    """Where the call of this key got to, in this activity; None when it told nothing. Stand-ins have their own."""
    told = _position.get()
    return told[-1][1] if told and told[-1][0] == key else None


def resume(key: str, position: Any) -> None:
    """Begins where an earlier activity got to, unless this one has got further."""
    told = _position.get()
    if told is None:
        _position.set(told := [])  # without a beat, for this attempt alone
    if position is not None and not (told and told[-1][0] == key):
        told[:] = [[key, position]]


def advance(key: str, position: Any) -> None:
    """Tells how far the call has come: JSON data. The server hears at once; from a thread, with the next beat.

    Raises ValueError for what is none.
    """
    told, position = _position.get(), as_position(position)
    if told is None:
        return
    told[:] = [[key, position]]
    if not activity.in_activity() or not activity.info().heartbeat_timeout:
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return  # a sync tool's thread, where Temporal cannot be told
    activity.heartbeat(*told)


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
        told = [each for each in activity.info().heartbeat_details[-1:] if isinstance(each, list) and len(each) == 2]
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
