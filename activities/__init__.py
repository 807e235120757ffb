"""The activities. Each is a thin wrapper around one part of `holdfast/` and maps its errors to Temporal's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from activities.batches import Batches
from activities.plan import Plan
from activities.recovery import Repairs
from activities.resets import Resets
from activities.runs import RunRecords
from activities.tools import Tools
from activities.webhooks import Webhooks
from holdfast.engine.runtime import Runtime


def of_stage(runtime: Runtime) -> list[Callable[..., Any]]:
    """The activities of a worker that serves one stage: tools and their undos, and the activities of batches."""
    tools, batches = Tools(runtime), Batches(runtime)
    return [tools.tool, tools.undo, batches.list_items, batches.report_batch]


def activities(runtime: Runtime, workflows: Sequence[type]) -> list[Callable[..., Any]]:
    """All activities of a worker. workflows: the ones that it serves."""
    tools, records = Tools(runtime), RunRecords(runtime)
    repairs, batches, hooks = Repairs(runtime, records), Batches(runtime), Webhooks(runtime)
    resets = Resets(runtime, workflows)
    return [
        Plan(runtime).plan,
        tools.tool,
        tools.undo,
        tools.check,
        tools.give_up,
        tools.settle,
        batches.list_items,
        batches.report_batch,
        records.record_end,
        repairs.begin_repair,
        repairs.record_repair,
        repairs.find_orphans,
        resets.find_stuck,
        resets.mend,
        repairs.survey,
        repairs.look_back,
        repairs.in_doubt,
        repairs.to_undo,
        repairs.ask_probe,
        repairs.record_orphan,
        hooks.deliver,
        hooks.record_delivery,
    ]
