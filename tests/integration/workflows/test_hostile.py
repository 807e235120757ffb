"""Hostile input at each door of a run: it is refused in words, or kept as far as it can be, and the run ends."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import pytest
from pydantic import BaseModel, field_validator
from temporalio.api.common.v1 import Payload
from temporalio.client import WorkflowFailureError, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError

from activities.runs import RunRecords
from holdfast.authoring.tools import Tool, ToolContext, tool
from holdfast.contracts.data import Json
from holdfast.contracts.outside import CUT
from holdfast.contracts.people import DecisionReply
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import RunEnd, RunOutcome, RunResult
from holdfast.state.runs import Runs
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, failure, status, until
from tests.fixtures.world import World, agent

YES: Json = {"approval_id": "a1", "verdict": "approve", "approver": "dr.lee"}


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


RAW = {
    "65 deep": deep(65),
    "196 deep": deep(196),
    "10,000 deep": deep(10_000),
    "never closed": "[" * 10_000,
    "NUL": '"\\u0000"',
    "half a character": '"\\ud83d"',
    "a large number": "9" * 40,
    "not a number": "NaN",
    "many": f"[{'0,' * 100_000}0]",
    "long": f'"{"x" * 1_500_000}"',
    "empty text": '""',
    "nothing": "null",
    "not ASCII": '"日本 \\u202e"',
    "no JSON": "}{",
}
"""JSON texts, and what is none."""


def raw(text: str) -> RawValue:
    return RawValue(Payload(metadata={"encoding": b"json/plain"}, data=text.encode()))


async def by_hand(stage: Stage, workflow: str, *payloads: Any) -> WorkflowHandle[Any, Any]:
    return await stage.client.start_workflow(
        workflow, args=payloads, id=f"hand-{uuid.uuid4().hex[:8]}", task_queue=stage.queue
    )


async def refused(handle: WorkflowHandle[Any, Any]) -> str:
    """What is wrong with a start that was refused."""
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(WorkflowFailureError) as caught:
            await handle.result()
    cause = caught.value.cause
    assert isinstance(cause, ApplicationError), cause
    assert cause.type == "invalid_input"
    return cause.message


# ------------------------------------------------------------------ starts by hand


@pytest.mark.parametrize(
    "workflow", ["AgentWorkflow", "BatchWorkflow", "RepairWorkflow", "DeliveryWorkflow", "OrphanSweep"]
)
async def test_a_start_with_no_input_with_two_or_with_another_shape_ends_at_once(lite: Stage, workflow: str) -> None:
    async with lite.worker():
        for payloads in ([], [{}, {}], [{"agent": "x"}, "y", 3]):
            said = await refused(await by_hand(lite, workflow, *payloads))
            assert "exactly one input is taken, an object " in said
            assert f"there are {len(payloads)}" in said
        for text in (
            *RAW.values(),
            "[]",
            '{"batch": {"a": 1}, "url": 7, "actions": 9, "grace_s": []}',
        ):
            said = await refused(await by_hand(lite, workflow, raw(text)))
            assert "the input of a run is an object " in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"state": {}}, "`state` is what continue-as-new hands on: leave it out"),
        ({"state": {"key_base": "other/123", "started": "2026-11-26T00:00:00Z"}}, "`state` is what continue-as-new"),
        ({"tenant": "t" * 3_000}, "`tenant` takes printable text of at most 200 characters; it has 3,000"),
        ({"tenant": "t\0"}, "`tenant` takes printable text"),
        ({"request_key": "k" * 300}, "`request_key` takes printable text"),
        ({"webhook": "https://x/" + "y" * 3_000}, "`webhook` takes printable text of at most 2,000 characters"),
        ({"input": {"a": [0] * 100_001}}, "`input` has more than 100,000 values"),
        ({"input": {"a": 2**70}}, "`input` has a number of more than 64 bits"),
    ],
    ids=str,
)
async def test_a_start_with_what_no_run_can_carry_ends_at_once(lite: Stage, more: Json, words: str) -> None:
    async with lite.worker():
        for workflow, named in (("AgentWorkflow", "agent"), ("BatchWorkflow", "batch")):
            if workflow == "AgentWorkflow" or "webhook" not in more:
                assert words in await refused(await by_hand(lite, workflow, {named: "x", **more}))


async def test_a_start_with_a_deep_input_ends_at_once(lite: Stage) -> None:
    async with lite.worker():
        for depth in (65, 190):
            start = raw(f'{{"agent": "x", "input": {{"a": {deep(depth)}}}}}')
            assert "`input` is nested deeper than 64 levels" in await refused(
                await by_hand(lite, "AgentWorkflow", start)
            )


# ------------------------------------------------------------------ people


async def asking(stage: Stage, *tools: Tool) -> WorkflowHandle[Any, RunResult]:
    """A run that asks for an approval."""
    stage.model.script = sequence(call((tools[0].name, {})), say("done"))
    handle = await stage.start(agent(*tools))
    await until(handle, lambda now: bool(now.approvals))
    return handle


@pytest.mark.parametrize("name", ["decide", "message"])
async def test_hostile_signals_and_updates_change_nothing_and_the_run_ends(lite: Stage, name: str) -> None:
    around = [
        '{"approval_id": "a9", "verdict": "edit", "approver": "x", "arguments": {"n": %s}}',
        '{"text": %s, "by": "x"}',
        "%s",
    ]
    texts = [form % text for form in around for text in RAW.values()]
    async with lite.worker():
        handle = await asking(lite, World().tool("send", approval=True))
        for text in texts:
            await handle.signal(name, args=[raw(text)])
            reply = await handle.execute_update(name, args=[raw(text)], result_type=DecisionReply)
            good = name == "message" and text.startswith('{"text": "') and "\\ud83d" not in text and '""' not in text
            assert good or not reply.accepted, (reply, text[:200])
        for payloads in ([], [YES, YES], [raw(deep(10_000)), raw(deep(10_000))]):
            await handle.signal(name, args=payloads)
            assert not (await handle.execute_update(name, args=payloads, result_type=DecisionReply)).accepted
        assert all(len(note) < 3_000 for note in (await status(handle)).notes)
        await handle.signal("decide", YES)
        assert (await handle.result()).outcome is RunOutcome.COMPLETED


async def test_an_update_of_3_mb_is_refused_at_once_and_the_run_goes_on(lite: Stage) -> None:
    async with lite.worker():
        handle = await asking(lite, World().tool("send", approval=True))
        for text in (f'{{"result": "{"x" * 3_000_000}"}}', "{" + " " * 3_000_000 + "}"):
            begun = time.monotonic()
            with pytest.raises(WorkflowUpdateFailedError):
                await handle.execute_update("decide", args=[raw(text)], result_type=DecisionReply)
            assert time.monotonic() - begun < PATIENCE_S
            with pytest.raises(RPCError):
                await handle.signal("decide", args=[raw(text)])
        history = await handle.fetch_history()
        assert not [each for each in history.events if each.HasField("workflow_task_failed_event_attributes")]
        await handle.signal("decide", YES)
        assert (await handle.result()).outcome is RunOutcome.COMPLETED


class Guarded(BaseModel):
    n: int = 0

    @field_validator("n")
    @classmethod
    def _checked(cls, value: int) -> int:
        if value == 7:
            raise RecursionError("this argument can never be checked")
        return value


async def test_an_activity_that_can_never_succeed_ends_the_run_which_unwinds(lite: Stage) -> None:
    """Asked to check an edit, the tool's own model fails by the data alone: there is no second try."""
    world = World()
    book = world.tool("book")

    @tool(effect=Effect.IDEMPOTENT, service="x", approval=True, arguments=Guarded)
    async def send(ctx: ToolContext, **arguments: Any) -> str:
        """Sends."""
        return "sent"

    lite.model.script = sequence(call(("book", {})), call(("send", {})), say("done"))
    async with lite.worker():
        handle = await lite.start(agent(book, send))
        await until(handle, lambda now: bool(now.approvals))
        edit = {"approval_id": "a2", "verdict": "edit", "approver": "dr.lee", "arguments": {"n": 7}}
        await handle.signal("decide", edit)
        result = await failure(handle)
    assert result.reason.startswith("gave up: this can never succeed, so it is not tried again: RecursionError")
    assert world.log == ["begin book#1", "done book#1", "undo book#1"]


# ------------------------------------------------------------------ models and tools


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (deep(196), "nested deeper than 64 levels"),
        (deep(5_000), "not valid JSON"),
        ("9" * 30, "a number of more than 64 bits"),
        (f"[{'0,' * 100_000}0]", "more than 100,000 values"),
    ],
    ids=["196 deep", "5,000 deep", "a large number", "many"],
)
async def test_hostile_arguments_go_back_to_the_model(lite: Stage, value: str, words: str) -> None:
    @tool(effect=Effect.IDEMPOTENT, service="x")
    async def keep(ctx: ToolContext, what: Any = None) -> str:
        """Keeps."""
        return "kept"

    lite.model.script = sequence(
        call(("keep", f'{{"what": {value}}}')), call(("keep", {"what": "\0 日本"})), say("done")
    )
    async with lite.worker():
        result = await (await lite.start(agent(keep))).result()
    assert (result.outcome, result.calls) == (RunOutcome.COMPLETED, 1)
    told = [m["content"] for m in lite.model.requests[-1][1] if m["role"] == "tool"]
    assert words in told[0]
    assert told[1] == "kept"


def pit(depth: int) -> Any:
    value: Any = "bottom"
    for _ in range(depth):
        value = {"a": [value]}
    return value


RESULTS: dict[str, Any] = {
    "90 deep": pit(45),
    "300 deep": pit(150),
    "5,000 deep": pit(2_500),
    "NUL": "a\0b",
    "half a character": ["\ud83d", {"\ud83d": 1}],
    "a large number": 2**200,
    "not a number": [float("nan"), float("inf")],
}


@pytest.mark.parametrize("name", RESULTS)
async def test_what_a_tool_returns_is_kept_as_far_as_it_can_be(stage: Stage, name: str) -> None:
    done: list[str] = []

    @tool(effect=Effect.MANUAL, service="x")
    async def fetch(ctx: ToolContext) -> Any:
        """Fetches."""
        done.append(ctx.key)
        return RESULTS[name]

    stage.model.script = sequence(call(("fetch", {})), say("done"))
    async with stage.worker():
        handle = await stage.start(agent(fetch))
        result = await handle.result()
    assert (result.outcome, len(done)) == (RunOutcome.COMPLETED, 1)
    told = stage.model.requests[-1][1][-1]["content"]
    assert (CUT in told) == ("deep" in name)
    assert (await stage.stored(handle)).outcome is RunOutcome.COMPLETED


# ------------------------------------------------------------------ the end


async def test_an_end_that_cannot_be_kept_whole_is_kept_without_its_data_and_says_so(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's refusal is made up: what is known to bring one about is refused at a door, or cleaned, before."""
    finish = Runs.finish

    async def choosy(self: Runs, workflow_id: str, outcome: RunOutcome, result: str, **more: Any) -> None:
        if "cannot be kept" in result and "could not be kept whole" not in result:
            raise RecursionError("too deep for this store")
        await finish(self, workflow_id, outcome, result, **more)

    monkeypatch.setattr(Runs, "finish", choosy)
    stage.model.script = sequence(say("these words cannot be kept"))
    async with stage.worker():
        handle = await stage.start(agent(steps=[]))
        assert (await handle.result()).summary == "these words cannot be kept"
        kept = await stage.stored(handle)
    assert kept.outcome is RunOutcome.COMPLETED
    [note] = kept.notes
    assert note.startswith("the result could not be kept whole: RecursionError: too deep for this store")


async def test_an_end_with_texts_that_postgres_refuses_is_kept(stage: Stage) -> None:
    """A run of before: a tenant, a role and a reason with characters that no door lets through today."""
    records = RunRecords(stage.runtime)
    result = RunResult(outcome=RunOutcome.FAILED, agent="a\0b", reason="NUL \0", key_base="w\0/1")
    await records.record("w\0", RunEnd(tenant="t\0", result=result, requested_by="x\0\ud83d"))
    row = await Runs(stage.runtime.db).by_workflow("w\0")
    assert row is not None
    assert row.outcome == "failed"
