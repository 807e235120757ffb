"""The activities: thin; each wraps one thing of `holdfast/` and says how its errors leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from holdfast.runtime import Runtime


def activities(runtime: Runtime) -> list[Callable[..., Any]]:
    """All activities of a worker."""
    from activities.plan import Plan
    from activities.runs import RunRecords
    from activities.tools import Tools

    tools = Tools(runtime)
    return [Plan(runtime).plan, tools.tool, tools.undo, RunRecords(runtime).record_end]
