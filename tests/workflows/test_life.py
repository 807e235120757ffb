"""A run from start to end: how each outcome looks to Temporal, to the caller and in the store."""

from __future__ import annotations

from pydantic import BaseModel

from agents import registry
from holdfast.agent import AgentSpec
from holdfast.contracts import Effect, RunOutcome, StepSpec, StepStatus
from holdfast.tools import ToolContext, tool
from tests.fixtures.model import call, say, sequence
from tests.fixtures.temporal import Stage


class Anything(BaseModel):
    what: str = "x"


@tool(effect=Effect.READ, service="echo")
async def echo(ctx: ToolContext, text: str) -> str:
    """Echo."""
    return f"echo {text}"


SPEC = registry.add(
    AgentSpec(
        name="life",
        description="test",
        instructions="test",
        input=Anything,
        tools=(echo,),
        steps=(StepSpec(name="speak", tools=["echo"]),),
    )
)


async def test_completes_with_its_result(stage: Stage) -> None:
    stage.model.script = sequence(call(("echo", {"text": "a"}), ("echo", {"text": "b"})), say("all done"))
    async with stage.worker():
        handle = await stage.start(SPEC)
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert (result.summary, result.turns, result.calls) == ("all done", 2, 2)
    assert [s.status for s in result.steps] == [StepStatus.DONE]
    assert [m["content"] for m in stage.model.requests[-1][1][-2:]] == ["echo a", "echo b"]
    assert result.usage.calls == 2
