"""One tool call under its key: what goes back to the model, what leaves as an error, what the ledger keeps."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.tools import Tools
from holdfast.authoring.tools import Tool, ToolContext, tool
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ToolFailed, ToolRefused
from holdfast.contracts.profile import Effect
from holdfast.contracts.tool_call import Outcome, ToolRequest, UndoOutcome, UndoStatus
from holdfast.contracts.turn import OutcomeStatus
from holdfast.reliability.crash_points import Point
from holdfast.reliability.ledger import State
from holdfast.testing.model import say
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.wire import Step, Then, answer, free_port, wire
from tests.fixtures.world import World, agent
from tests.integration.activities.conftest import Process


def request(made: Tool, arguments: Json | None = None, **more: Any) -> ToolRequest:
    return ToolRequest(
        **{"agent": agent(made).name, "key_base": "wf/run", "seq": 1, "tool": made.name, "arguments": arguments or {}}
        | more
    )


async def run(process: Process, of: ToolRequest) -> Outcome:
    return await process.run(Tools(process.runtime).tool, of)


async def undo(process: Process, of: ToolRequest) -> UndoOutcome:
    return await process.run(Tools(process.runtime).undo, of)


async def row(process: Process, key: str = "wf/run/1") -> Any:
    return next((e for e in await process.runtime.ledger.entries("wf/run") if e.key == key), None)


async def test_a_result_goes_back_and_its_key_went_down(process: Process) -> None:
    world = World()
    of = request(world.tool("book"))
    outcomes = [await run(process, of) for _ in range(2)]
    assert outcomes == [Outcome(content="book#1 done")] * 2
    assert world.keys == ["wf/run/1"]


async def test_structured_results_are_json_and_too_long_ones_are_cut(process: Process) -> None:
    @tool(effect=Effect.READ, service="x")
    async def fetch(ctx: ToolContext, size: int) -> dict[str, str]:
        """Fetch."""
        return {"text": "é" * size}

    of = request(fetch, {"size": 3})
    assert (await run(process, of)).content == '{"text": "ééé"}'
    long = await run(process, of.model_copy(update={"arguments": {"size": 200_000}}))
    assert len(long.content) < 101_000
    assert "[cut: the result has 400012 bytes, 100000 are shown" in long.content


async def test_a_sync_tool_does_not_block_the_loop(process: Process) -> None:
    released = threading.Event()

    @tool(effect=Effect.READ, service="x", timeout=5)
    def slow(ctx: ToolContext) -> bool:
        """Wait for the loop."""
        return released.wait(PATIENCE_S)

    asyncio.get_running_loop().call_later(0.05, released.set)
    assert (await run(process, request(slow))).content == "true"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tool": "nope"}, "there is no tool named 'nope'"),
        ({"arguments": {"n": "x"}}, "n: Input should be a valid integer"),
        ({"arguments": {"m": 1}}, "m: Extra inputs are not permitted"),
    ],
)
async def test_the_models_own_mistakes_are_told_and_touch_nothing(process: Process, change: Json, told: str) -> None:
    world = World()
    outcome = await run(process, request(world.tool("book"), **change))
    assert outcome.status is OutcomeStatus.ERROR
    assert told in outcome.content
    assert (world.log, await row(process)) == ([], None)


async def test_a_key_that_was_used_with_other_arguments_is_left_to_a_person(process: Process) -> None:
    world = World()
    of = request(world.tool("book"), {"n": 1})
    await run(process, of)
    outcome = await run(process, of.model_copy(update={"arguments": {"n": 2}}))
    assert outcome.status is OutcomeStatus.UNKNOWN
    assert "wf/run/1" in outcome.content
    assert world.log == ["begin book#1", "done book#1"]


@tool(effect=Effect.READ, service="wire", timeout=1, retries=0)
async def read(ctx: ToolContext, url: str) -> str:
    """Read."""
    return (await ctx.http.get(url)).raise_for_status().text


def posting(effect: Effect) -> Tool:
    @tool(effect=effect, service="wire", timeout=1, retries=0, name=f"post_{effect}")
    async def post(ctx: ToolContext, url: str) -> str:
        """Post."""
        return (await ctx.http.post(url)).raise_for_status().text

    if effect is Effect.PROBE:

        @post.probe
        async def there(ctx: ToolContext, url: str) -> None:
            return None

    return post


POSTS = {effect: posting(effect) for effect in (Effect.IDEMPOTENT, Effect.PROBE, Effect.MANUAL)}
OK, ERROR, FAILED, UNKNOWN = OutcomeStatus.OK, OutcomeStatus.ERROR, OutcomeStatus.FAILED, OutcomeStatus.UNKNOWN
ENDS: dict[str, tuple[list[Step] | None, OutcomeStatus, OutcomeStatus]] = {
    "200": ([answer(200, b"ok")], OK, OK),
    "400": ([answer(400, b"no such patient")], ERROR, ERROR),
    "404": ([answer(404)], ERROR, ERROR),
    "401": ([answer(401)], FAILED, FAILED),
    "429": ([answer(429)], FAILED, FAILED),
    "503": ([answer(503)], FAILED, UNKNOWN),
    "timeout": ([Then.HANG], FAILED, UNKNOWN),
    "reset": ([Then.RESET], FAILED, UNKNOWN),
    "unreachable": (None, FAILED, FAILED),
}


@pytest.mark.parametrize("effect", Effect)
@pytest.mark.parametrize("failure", ENDS)
async def test_how_a_call_ends_without_retries_left(process: Process, effect: Effect, failure: str) -> None:
    """A read that failed did nothing; what changes things may have happened once the request was out."""
    steps, of_a_read, of_an_effect = ENDS[failure]
    expected = of_a_read if effect is Effect.READ else of_an_effect
    async with wire(*(steps or ())) as service:
        url = service.url if steps else f"http://127.0.0.1:{free_port()}"
        outcome = await run(process, request(POSTS.get(effect, read), {"url": url}))
    assert outcome.status is expected, outcome
    assert outcome.failures == (0 if expected is OK else 1)
    if failure == "400":
        assert "no such patient" in outcome.content
    if expected is UNKNOWN:
        assert "do not call this tool again" in outcome.content


async def test_a_failure_that_may_pass_leaves_as_an_error_with_its_delay(process: Process) -> None:
    of = request(World().tool("book", errors=[ConnectionRefusedError("no")], retries=1))
    with pytest.raises(ApplicationError) as caught:
        await run(process, of)
    assert (caught.value.type, caught.value.non_retryable) == ("unreachable", False)
    delay = caught.value.next_retry_delay
    assert delay is not None
    assert 0.4 <= delay.total_seconds() <= 0.6
    assert await run(process, of) == Outcome(content="book#1 done", failures=1)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (ToolRefused("only on weekdays"), ERROR, "only on weekdays"),
        (ToolFailed("closed for good"), FAILED, "closed for good"),
        (ZeroDivisionError("a bug"), UNKNOWN, "ZeroDivisionError: a bug"),
    ],
)
async def test_what_a_tool_raises_itself(process: Process, error: Exception, status: OutcomeStatus, says: str) -> None:
    outcome = await run(process, request(World().tool("book", errors=[error])))
    assert outcome.status is status
    assert says in outcome.content


async def test_a_cancelled_activity_settles_the_effect_that_is_out(process: Process) -> None:
    world, gate = World(), asyncio.Event()
    of = request(world.tool("book", gate=gate))
    env = ActivityEnvironment()
    running = asyncio.ensure_future(env.run(Tools(process.runtime).tool, of))
    await world.saw("begin book#1")
    env.cancel()
    await asyncio.sleep(0)
    gate.set()
    assert await running == Outcome(content="book#1 done")
    assert (await row(process)).state is State.DONE


async def test_a_models_answer_inside_a_tool_is_paid_once(process: Process) -> None:
    crashes = [ConnectionResetError("after the model answered")]

    @tool(effect=Effect.IDEMPOTENT, service="x")
    async def summarise(ctx: ToolContext) -> str:
        """Summarise."""
        text = (await ctx.ask_model("summary", [{"role": "user", "content": "sum up"}])).text
        if crashes:
            raise crashes.pop()
        return text

    process.model.script = lambda messages: say("in short: fine")
    of = request(summarise)
    with pytest.raises(ApplicationError):
        await run(process, of)
    outcome = await run(process, of)
    assert (outcome.content, outcome.usage.calls) == ("in short: fine", 1)
    assert [key for key, _ in process.model.requests] == ["wf/run/1/summary"]


# ------------------------------------------------------------ undo


async def test_an_undo_gets_what_the_call_returned_and_runs_once(process: Process) -> None:
    world = World()
    of = request(world.tool("book"))
    await run(process, of)
    first, second = await undo(process, of), await undo(process, of)
    assert first == second
    assert first.status is UndoStatus.UNDONE
    assert first.note == "book#1 undone, result was book#1 done"
    assert world.log.count("undo book#1") == 1
    assert (await row(process)).state is State.COMPENSATED


@pytest.mark.parametrize(
    ("point", "runs"),
    [(Point.UNDO_STARTED, 1), (Point.UNDO_RESERVED, 1), (Point.UNDO_DONE, 2), (Point.UNDO_RECORDED, 1)],
)
async def test_an_undo_that_was_cut_off_goes_to_its_end(process: Process, point: Point, runs: int) -> None:
    world = World()
    of = request(world.tool("book"))
    await run(process, of)
    await process.dies(point, Tools(process.runtime).undo, of)
    assert (await undo(process, of)).status is UndoStatus.UNDONE
    assert world.log.count("undo book#1") == runs
    assert (await row(process)).state is State.COMPENSATED


async def test_after_an_undo_the_call_cannot_begin_any_more(process: Process) -> None:
    world = World()
    of = request(world.tool("book"))
    assert (await undo(process, of)).status is UndoStatus.NOTHING
    assert (await run(process, of)).status is ERROR
    assert world.log == []


async def test_a_retry_that_comes_after_the_undo_does_not_act(process: Process) -> None:
    world = World()
    of = request(world.tool("book", errors=[ConnectionResetError("perhaps done")], retries=3))
    with pytest.raises(ApplicationError):
        await run(process, of)
    assert (await undo(process, of)).status is UndoStatus.UNDONE
    late = await run(process, of)
    assert late.status is not OK
    assert world.log == ["begin book#1", "undo book#1"]


async def test_what_was_undone_is_not_reported_as_done(process: Process) -> None:
    """A run that was cancelled and is then reset meets its own keys again."""
    of = request(World().tool("book"))
    await run(process, of)
    await undo(process, of)
    outcome = await run(process, of)
    assert outcome.status is ERROR, "the model may call it again, under a new key"
    assert "undone" in outcome.content


async def test_a_deploy_that_adds_an_argument_with_a_default_is_no_other_call(process: Process) -> None:
    @tool(effect=Effect.IDEMPOTENT, service="x", name="book")
    async def older(ctx: ToolContext, n: int) -> str:
        """Book."""
        raise ConnectionResetError("gone")

    @tool(effect=Effect.IDEMPOTENT, service="x", name="book")
    async def newer(ctx: ToolContext, n: int, note: str = "") -> str:
        """Book."""
        return f"booked {n}"

    of = request(older, {"n": 1})
    with pytest.raises(ApplicationError):
        await run(process, of)
    assert await run(process, request(newer, {"n": 1})) == Outcome(content="booked 1", failures=1)
