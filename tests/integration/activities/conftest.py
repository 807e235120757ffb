"""What the activities of a worker stand on, without a server: each test runs once on each store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from temporalio.testing import ActivityEnvironment

import activities.recovery
import activities.tools
from holdfast.engine.runtime import Runtime
from holdfast.reliability import crash_points
from holdfast.reliability.crash_points import Point
from holdfast.testing.model import FakeModel
from holdfast.testing.stage import a_runtime


class Killed(BaseException):
    """Stands for the death of the process: nobody may catch it."""


@dataclass
class Process:
    """One worker process. `dies` arms its death at a crash point."""

    runtime: Runtime
    model: FakeModel

    async def run(self, activity: Callable[..., Any], request: Any) -> Any:
        return await ActivityEnvironment().run(activity, request)

    async def dies(self, point: Point, activity: Callable[..., Any], request: Any) -> None:
        """Runs the activity and checks that it is cut off at this point."""
        crash_points.arm(f"kill:{point}")
        with pytest.raises(Killed):
            await self.run(activity, request)


@pytest_asyncio.fixture
async def process(store_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Process]:
    def strike(*_: Any) -> None:
        raise Killed

    # There is no server here that could have reset the run.
    async def goes_on(*_: Any) -> bool:
        return False

    async def is_over(*_: Any) -> bool:
        return True

    monkeypatch.setattr(activities.tools, "goes_on", goes_on)
    monkeypatch.setattr(activities.recovery, "is_over", is_over)
    monkeypatch.setattr(activities.tools.activity, "client", lambda: None)
    monkeypatch.setattr(crash_points, "strike", strike)
    monkeypatch.setattr(crash_points, "_armed", None)  # put back at the end, fired or not
    async with a_runtime(store_url) as (runtime, model):
        yield Process(runtime, model)
