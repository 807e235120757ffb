"""Every activity heartbeats by itself, so that a dead worker is noticed in seconds and nobody has to remember it."""

from __future__ import annotations

import asyncio
from typing import Any

from temporalio import activity
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor

from holdfast.reliability import lease


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

        def beat() -> None:
            nonlocal timer
            held.renew()
            activity.heartbeat()
            timer = loop.call_later(interval, beat)

        timer = loop.call_later(interval, beat)
        try:
            return await self.next.execute_activity(input)
        finally:
            timer.cancel()
