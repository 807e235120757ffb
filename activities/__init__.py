"""The activities: thin; each wraps one thing of `holdfast/` and says how its errors leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from holdfast.runtime import Runtime


def of_stage(runtime: Runtime) -> list[Callable[..., Any]]:
    """The activities of a worker that serves one stage: what tools of that stage do and undo."""
    from activities.tools import Tools

    tools = Tools(runtime)
    return [tools.tool, tools.undo]


def activities(runtime: Runtime) -> list[Callable[..., Any]]:
    """All activities of a worker."""
    from activities.plan import Plan
    from activities.repairs import Repairs
    from activities.runs import RunRecords
    from activities.tools import Tools

    tools, records = Tools(runtime), RunRecords(runtime)
    repairs = Repairs(runtime, records)
    return [
        Plan(runtime).plan,
        tools.tool,
        tools.undo,
        tools.give_up,
        tools.settle,
        records.record_end,
        repairs.begin_repair,
        repairs.record_repair,
        repairs.find_orphans,
        repairs.survey,
        repairs.ask_probe,
        repairs.record_orphan,
    ]
