"""Models as they are: they ramble, are cut at their limit, are slow. All that they cost is counted, and a run ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
from starlette.responses import Response, StreamingResponse

from holdfast.authoring.agent import ModelOptions
from holdfast.authoring.tools import ToolContext, tool
from holdfast.contracts.people import ApprovalDecision, Verdict
from holdfast.contracts.profile import Effect, StepSpec
from holdfast.contracts.run import Phase, RunOutcome
from holdfast.contracts.turn import Usage
from holdfast.testing.model import Message, call, say, sequence, turn
from holdfast.testing.stage import Stage, cancelled, failure, until
from tests.fixtures.world import World, agent


def stream(*chunks: Message, forever: str = "", every_s: float = 0.0) -> Response:
    """The chunks as a stream; then these words again and again, without end."""

    async def body() -> AsyncIterator[str]:
        for chunk in chunks:
            yield f"data: {json.dumps({'model': 'fake-1', **chunk})}\n\n"
        more = {"model": "fake-1", "choices": [{"index": 0, "delta": {"content": forever}}]}
        while forever:
            yield f"data: {json.dumps(more)}\n\n"
            await asyncio.sleep(every_s)

    return StreamingResponse(body(), media_type="text/event-stream")


def rambles() -> Response:
    return stream(forever="and so on and on " * 10_000)


def cut(message: Message) -> Response:
    """The message, at whose end the model had reached its limit."""
    delta = dict(message)
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": n, **each} for n, each in enumerate(delta["tool_calls"])]
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    return stream(
        {"choices": [{"index": 0, "delta": delta}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], "usage": usage},
    )


def times(n: int, first: Callable[[], Response], then: Callable[[list[Message]], Message]) -> Callable[..., object]:
    """The first n questions get `first`."""
    left = iter(range(n))
    return lambda messages: first() if next(left, None) is not None else then(messages)


async def test_a_model_that_only_rambles_fails_the_run_after_three_counted_answers(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"))
    lite.model.script = lambda messages: rambles()
    async with lite.worker():
        handle = await lite.start(spec)
        result = await failure(handle)
    assert result.outcome is RunOutcome.FAILED
    assert "the model rambles" in result.reason and "3 times" in result.reason
    assert len(lite.model.requests) == 3
    assert result.usage.calls == 3
    assert result.usage.output_tokens > 3 * 900_000, "estimated from what came"
    assert result.usage.unpriced == 3
    assert (await lite.stored(handle)).usage == result.usage
    breakers = await lite.runtime.guards.breaker.rows()
    assert not [each for each in breakers if each.state != "closed" or each.failures]


async def test_rambling_that_ends_costs_what_it_costs_and_the_run_goes_on(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"))
    lite.model.script = times(2, rambles, sequence(call(("book", {})), say("done")))  # type: ignore[assignment]
    async with lite.worker():
        result = await (await lite.start(spec)).result()
    assert result.outcome is RunOutcome.COMPLETED
    assert result.usage.calls == 4 == len(lite.model.requests)
    assert result.usage.output_tokens > 2 * 900_000


async def test_a_rambling_model_inside_a_tool_fails_the_tool_and_is_counted(lite: Stage) -> None:
    @tool(effect=Effect.READ, service="summaries")
    async def summary(ctx: ToolContext) -> str:
        """Sum up."""
        return (await ctx.ask_model("sum", [{"role": "user", "content": "sum"}])).text

    def script(messages: list[Message]) -> Message | Response:
        if messages[0]["content"] == "sum":
            return cut(say("half a summ"))
        return call(("summary", {})) if turn(messages) == 1 else say("no summary")

    lite.model.script = script
    spec = agent(summary, steps=[StepSpec(name="summary", tools=["summary"], critical=False)])
    async with lite.worker():
        result = await (await lite.start(spec)).result()
    assert result.outcome is RunOutcome.PARTIAL
    assert "cut at its limit of 8192 tokens" in result.pending[0].what
    assert len(lite.model.requests) == 5 == result.usage.calls
    assert result.usage.output_tokens == 5 * 20, "the endpoint said what the cut ones used"


@pytest.mark.parametrize("half", [say("I have boo"), call(("book", '{"n": 1'), ("book", "{}")), say("")])
async def test_an_answer_cut_at_its_limit_is_no_end_and_the_model_hears_of_it(lite: Stage, half: Message) -> None:
    world = World()
    spec = agent(world.tool("book"), steps=[])
    lite.model.script = times(1, lambda: cut(half), sequence(say("-"), call(("book", {})), say("done")))  # type: ignore[assignment]
    async with lite.worker():
        result = await (await lite.start(spec)).result()
    assert (result.outcome, result.summary) == (RunOutcome.COMPLETED, "done")
    told = lite.model.bodies[1]["messages"][-1]["content"]
    assert "cut at its limit" in told
    assert all("cut" not in each for each in lite.model.bodies[1]["messages"])
    assert world.log == ["begin book#1", "done book#1"]
    assert result.usage.calls == 3


async def test_a_model_that_is_always_cut_ends_the_run_with_all_calls_counted(lite: Stage) -> None:
    lite.model.script = lambda messages: cut(say("I have"))
    async with lite.worker():
        handle = await lite.start(agent(World().tool("book")))
        result = await failure(handle)
    assert "invalid 3 times in a row" in result.reason and "cut at its limit" in result.reason
    assert result.usage == Usage(calls=3, input_tokens=300, output_tokens=60, unpriced=3)


async def test_a_slow_model_parks_the_run_and_what_it_costs_is_seen_meanwhile(lite: Stage) -> None:
    lite.runtime.settings.model_total_s = 0.4
    lite.model.script = lambda messages: stream(forever="x", every_s=0.1)
    async with lite.worker():
        handle = await lite.start(agent(World().tool("book")))
        now = await until(handle, lambda now: now.phase is Phase.PARKED and now.usage.calls > 0)
        assert now.usage.calls <= len(lite.model.requests)
        assert now.usage.output_tokens < 100
        await handle.cancel()
        await cancelled(handle)
    stored = await lite.stored(handle)
    assert stored.outcome is RunOutcome.CANCELLED
    assert stored.usage.calls >= now.usage.calls


# ------------------------------------------------------------------ what a request demands


async def test_a_call_is_required_while_a_critical_step_is_open_and_no_longer(lite: Stage) -> None:
    world = World()
    spec = agent(
        world.tool("book"),
        world.tool("remind"),
        steps=[StepSpec(name="book", tools=["book"]), StepSpec(name="remind", tools=["remind"], critical=False)],
    )
    lite.model.script = sequence(say("nothing to do"), call(("book", {})), call(("remind", {})), say("done"))
    async with lite.worker():
        result = await (await lite.start(spec)).result()
    assert result.outcome is RunOutcome.COMPLETED
    assert [each.get("tool_choice") for each in lite.model.bodies] == ["required", "required", None, None]


async def test_after_a_persons_no_the_model_may_end(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book", approval=True), world.tool("send"))
    lite.model.script = sequence(call(("book", {})), say("the booking was not wanted"))
    async with lite.worker():
        handle = await lite.start(spec)
        (asked,) = (await until(handle, lambda now: bool(now.approvals))).approvals
        decision = ApprovalDecision(approval_id=asked.id, verdict=Verdict.REJECT, approver="dr.lee", comment="no")
        await handle.execute_update("decide", decision)
        assert (await handle.result()).outcome is RunOutcome.REJECTED
    assert [each.get("tool_choice") for each in lite.model.bodies] == ["required", None]


async def test_an_agent_says_how_its_model_is_asked(lite: Stage) -> None:
    @tool(effect=Effect.READ, service="summaries")
    async def summary(ctx: ToolContext) -> str:
        """Sum up."""
        wanted = ModelOptions(schema={"type": "object"}, max_tokens=50)
        await ctx.ask_model("json", [{"role": "user", "content": "sum"}], wanted)
        return (await ctx.ask_model("sum", [{"role": "user", "content": "sum"}])).text

    def script(messages: list[Message]) -> Message:
        if messages[0]["content"] == "sum":
            return say("{}")
        return call(("summary", {})) if turn(messages) == 1 else say("done")

    lite.model.script = script
    made = agent(summary, model=ModelOptions(max_tokens=700, temperature=0.2, extra={"seed": 7}))
    async with lite.worker():
        await (await lite.start(made)).result()
    asked = [(each["max_tokens"], each.get("temperature"), each.get("seed")) for each in lite.model.bodies]
    assert asked == [(700, 0.2, 7), (50, None, None), (700, 0.2, 7), (700, 0.2, 7)]
    assert ["response_format" in each for each in lite.model.bodies] == [False, True, False, False]
