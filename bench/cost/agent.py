"""The same work as a Holdfast agent."""

from __future__ import annotations

import os

from pydantic import BaseModel

from bench.cost import task
from holdfast.authoring import registry
from holdfast.authoring.agent import AgentSpec, Service
from holdfast.authoring.tools import ToolContext, tool
from holdfast.contracts.profile import Effect


class Work(BaseModel):
    name: str
    turns: int
    gate: bool = False


LIMIT = int(os.environ["BENCH_PER_MINUTE"]) if "BENCH_PER_MINUTE" in os.environ else None


@tool(effect=Effect.IDEMPOTENT, service="rows", per_minute=LIMIT)
async def record(ctx: ToolContext, row: str) -> str:
    """Record one row."""
    return task.record(row)


@tool(effect=Effect.IDEMPOTENT, service="rows", approval=True)
async def release(ctx: ToolContext, row: str) -> str:
    """Release the rows."""
    return task.release(row)


SPEC = registry.add(
    AgentSpec(
        name="bench",
        description="Records a row a turn.",
        instructions=task.INSTRUCTIONS,
        input=Work,
        prompt=lambda work: task.prompt(work.name, work.turns, work.gate),
        tools=(record, release),
        max_turns=10_000,
        services=(Service("rows", requests_per_minute=LIMIT),),
    )
)
