"""Asking a human: what answers a request, what does not, and that nothing is lost or done twice."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.service import RPCError, RPCStatusCode

from holdfast.cli.runs import waiting
from holdfast.contracts.data import Json, digest
from holdfast.contracts.people import Approval, DecisionReply
from holdfast.contracts.profile import StepSpec
from holdfast.contracts.run import Phase, RunOutcome
from holdfast.state.runs import Runs
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, at_rest, cancelled, status, until
from tests.fixtures.temporal import skip, temporal_cli
from tests.fixtures.world import World, agent
from tests.unit.workflows.test_replay import replay

YES: Json = {"approval_id": "a1", "verdict": "approve", "approver": "dr.lee"}


async def asking(stage: Stage, world: World, calls: int = 1, **more: Any) -> WorkflowHandle[Any, Any]:
    """Starts a run that asks for `calls` approvals at once and ends after they are decided."""
    spec = agent(world.tool("send", approval=True), **more)
    stage.model.script = sequence(call(*(("send", {"n": n}) for n in range(calls))), say("ended"))
    return await stage.start(spec)


async def asked(handle: WorkflowHandle[Any, Any], count: int = 1) -> list[Approval]:
    return (await until(handle, lambda s: len(s.approvals) == count)).approvals


async def happened(handle: WorkflowHandle[Any, Any], kind: EventType.ValueType) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not [event async for event in handle.fetch_history_events() if event.event_type == kind]:
            await asyncio.sleep(0.02)


async def test_waits_for_30_days_and_the_deadline_stands_still(skipping: Stage) -> None:
    world = World()
    spec = agent(world.tool("send", approval=True), deadline=timedelta(hours=1))
    skipping.model.script = sequence(call(("send", {})), say("ended"))
    async with skipping.worker():
        handle = await skipping.start(spec)
        await asked(handle)
        await skip(skipping.client, timedelta(days=30))
        assert (await status(handle)).phase is Phase.WAITING_HUMAN
        await handle.signal("decide", YES)
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert 30 * 86_400 <= result.human_wait_s < 30 * 86_400 + 3600
    assert world.log == ["begin send#1", "done send#1"]


async def test_the_request_says_what_is_asked_and_what_has_been_done(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"), world.tool("send", approval=True))
    lite.model.script = sequence(call(("book", {})), call(("send", {"n": 7})), say("ended"))
    begun = time.monotonic()
    async with lite.worker():
        handle = await lite.start(spec)
        (approval,) = await asked(handle)
        assert (await handle.query("approvals", result_type=list[Approval])) == [approval]
        await handle.signal("decide", {**YES, "approval_id": "a2", "comment": "go ahead"})
        result = await handle.result()
    assert (approval.id, approval.subject, approval.arguments) == ("a2", "send", {"n": 7})
    assert approval.digest == digest({"n": 7})
    assert "1/2 steps" in approval.evidence
    assert approval.why
    kept = result.decisions[0]
    assert (kept.approval, kept.decision.approver, kept.decision.comment) == (approval, "dr.lee", "go ahead")
    assert 0 < result.human_wait_s < time.monotonic() - begun + 1


async def test_a_call_is_addressed_to_the_role_of_its_tool_else_of_its_step(lite: Stage) -> None:
    world = World()
    mine, steps, nobodys = (
        world.tool("mine", approval=True, role="physician"),
        world.tool("steps", approval=True),
        world.tool("nobodys", approval=True),
    )
    step = StepSpec(name="both", tools=["mine", "steps"], role="nurse")
    spec = agent(mine, steps, nobodys, steps=[step])
    lite.model.script = sequence(call(("mine", {}), ("steps", {}), ("nobodys", {})), say("ended"))
    async with lite.worker():
        handle = await lite.start(spec)
        await asked(handle, 3)
        for role, subjects in {"physician": ["mine"], "nurse": ["steps"], "": ["mine", "steps", "nobodys"]}.items():
            found, notes = await waiting(lite.client, handle.id, role)
            assert ([approval.subject for _, approval in found], notes) == (subjects, []), role
        await handle.cancel()
        await cancelled(handle)


def test_a_role_without_an_approval_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="role 'physician' is who approves its calls, so it needs approval=True"):
        World().tool("send", role="physician")


async def test_decided_at_once(lite: Stage) -> None:
    """An Update that waits for nothing: it follows the request within milliseconds."""
    world = World()
    async with lite.worker():
        handle = await asking(lite, world)
        reply = DecisionReply(accepted=False, message="")
        async with asyncio.timeout(PATIENCE_S):
            while not reply.accepted:
                reply = await handle.execute_update("decide", YES, result_type=DecisionReply)
        result = await handle.result()
    assert (result.outcome, world.log) == (RunOutcome.COMPLETED, ["begin send#1", "done send#1"])


@pytest.mark.parametrize("options", [{}, {"max_cached_workflows": 0}], ids=["cached", "uncached"])
async def test_two_at_once_answered_in_reverse_order(lite: Stage, options: Json) -> None:
    world = World()
    async with lite.worker(**options):
        handle = await asking(lite, world, calls=2)
        await asked(handle, 2)
        await handle.signal("decide", {**YES, "approval_id": "a2"})
        await world.saw("done send#2")
        await at_rest(handle)  # the later end of the two is the tool's
        assert [a.id for a in (await status(handle)).approvals] == ["a1"]
        await handle.signal("decide", {**YES, "verdict": "reject", "comment": "not this one"})
        result = await handle.result()
    assert world.log == ["begin send#2", "done send#2", "undo send#2"]
    assert [d.approval.id for d in result.decisions] == ["a2", "a1"]
    told = [m["content"] for m in lite.model.requests[-1][1] if m["role"] == "tool"]
    assert told[1] == "send#2 done"
    assert "not this one" in told[0]


async def test_the_reason_of_a_rejection_reaches_the_model(lite: Stage) -> None:
    async with lite.worker():
        handle = await asking(lite, World())
        await asked(handle)
        await handle.signal("decide", {**YES, "verdict": "reject", "comment": "the dose is wrong"})
        await handle.result()
    told = lite.model.requests[-1][1][-1]
    assert told["role"] == "tool"
    assert "dr.lee" in told["content"]
    assert "the dose is wrong" in told["content"]


async def test_decided_twice_the_first_counts(lite: Stage) -> None:
    world = World()
    async with lite.worker():
        handle = await asking(lite, world, calls=2)
        await asked(handle, 2)
        await handle.signal("decide", YES)
        await handle.signal("decide", {**YES, "verdict": "reject", "approver": "dr.no", "comment": "no"})
        noted = await until(handle, lambda s: bool(s.notes))
        await handle.signal("decide", {**YES, "approval_id": "a2"})
        result = await handle.result()
    assert "decision of dr.no ignored: a1 was already approved by dr.lee" in noted.notes[0]
    assert [(d.approval.id, d.decision.approver) for d in result.decisions] == [("a1", "dr.lee"), ("a2", "dr.lee")]
    assert sorted(world.log) == ["begin send#1", "begin send#2", "done send#1", "done send#2"]


@pytest.mark.parametrize("by", ["signal", "update"])
async def test_a_decision_in_the_workflow_task_that_asks_counts(lite: Stage, by: str) -> None:
    """A query can show the request before that task is complete, and a person may answer at once."""
    world = World()
    async with lite.worker(workflows_only=True):
        handle = await asking(lite, world)
        await happened(handle, EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
    async with lite.worker(activities_only=True):
        await happened(handle, EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED)
    sent = asyncio.ensure_future(
        handle.signal("decide", YES) if by == "signal" else handle.execute_update("decide", YES)
    )
    if by == "signal":
        await sent
    async with lite.worker():
        result = await handle.result()
        assert by == "signal" or (await sent)["accepted"]
    assert (result.outcome, [d.decision.approver for d in result.decisions]) == (RunOutcome.COMPLETED, ["dr.lee"])
    assert world.log == ["begin send#1", "done send#1"]
    assert result.notes == []


@pytest.mark.parametrize("end", ["cancel", "deadline"])
async def test_a_decision_in_the_workflow_task_that_ends_the_run_leaves_nothing_done(lite: Stage, end: str) -> None:
    """The request, the decision about it and the run's end come in one workflow task."""
    world = World()
    async with lite.worker(workflows_only=True):
        handle = await asking(lite, world, deadline=timedelta(seconds=1 if end == "deadline" else 60))
        await happened(handle, EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
    async with lite.worker(activities_only=True):
        await happened(handle, EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED)
    await handle.signal("decide", YES)
    if end == "cancel":
        await handle.cancel()
    else:
        begun = (await handle.describe()).start_time
        while (datetime.now(UTC) - begun).total_seconds() < 1.1:
            await asyncio.sleep(0.05)
    async with lite.worker():
        with pytest.raises(WorkflowFailureError):
            await handle.result()
    row = await Runs(lite.runtime.db).by_workflow(handle.id)
    assert row is not None
    assert row.outcome == (RunOutcome.CANCELLED if end == "cancel" else RunOutcome.FAILED)
    assert world.log in ([], ["begin send#1", "done send#1", "undo send#1"])


async def test_hundreds_of_decisions_about_what_nobody_asks_wait_together(lite: Stage) -> None:
    world = World()
    handle = await asking(lite, world)
    for n in range(500):
        await handle.signal("decide", {**YES, "approval_id": f"a{n + 2}"})
    async with lite.worker():
        await asked(handle)
        await handle.signal("decide", YES)
        result = await handle.result()
    assert (result.outcome, world.log) == (RunOutcome.COMPLETED, ["begin send#1", "done send#1"])
    timers = [e async for e in handle.fetch_history_events() if e.event_type == EventType.EVENT_TYPE_TIMER_STARTED]
    assert len(timers) <= 2


BAD: dict[str, tuple[Any, str]] = {
    "wrong id": ({**YES, "approval_id": "a9"}, "no approval 'a9' is open (open: a1)"),
    "digest of other arguments": ({**YES, "digest": "0123456789abcdef"}, "its digest is not that of a1"),
    "rejection without a reason": ({**YES, "verdict": "reject"}, "needs its reason in `comment`"),
    "no such verdict": (
        {**YES, "verdict": "maybe"},
        "verdict: Input should be 'approve', 'reject'",
    ),
    "nobody": ({**YES, "approver": ""}, "approver: "),
    "blank approver": ({**YES, "approver": " \t"}, "approver is blank"),
    "invisible approver": ({**YES, "approver": "\u200b\u2060\u3164"}, "approver is blank"),
    "the page's own word": ({**YES, "approver": " YOUR NAME "}, "approver is still 'YOUR NAME'"),
    "blank reason": ({**YES, "verdict": "reject", "comment": "\u00a0\u200d"}, "comment is blank"),
    "the page's reason": ({**YES, "verdict": "reject", "comment": "WHY"}, "comment is still 'WHY'"),
    "unknown field": ({**YES, "digst": "0"}, "no field 'digst'; did you mean digest? (fields: approval_id"),
    "no approver": ({"approval_id": "a1", "verdict": "approve"}, "approver: Field required"),
    "a text": ("approve", 'got "approve"'),
    "a list": ([YES], "expected one JSON object"),
    "nothing": (None, "got null"),
}


@pytest.mark.parametrize(("payload", "complaint"), BAD.values(), ids=BAD)
async def test_a_bad_decision_changes_nothing_and_is_noted_and_an_update_says_why(
    lite: Stage, payload: Any, complaint: str
) -> None:
    world = World()
    async with lite.worker():
        handle = await asking(lite, world)
        before = await asked(handle)
        await handle.signal("decide", payload)
        after = await until(handle, lambda s: bool(s.notes))
        assert complaint in after.notes[0]
        assert (after.phase, after.approvals, world.log) == (Phase.WAITING_HUMAN, before, [])
        reply = await handle.execute_update("decide", payload, result_type=DecisionReply)
        assert not reply.accepted
        assert complaint in reply.message
        good = await handle.execute_update("decide", {**YES, "digest": before[0].digest}, result_type=DecisionReply)
        assert (good.accepted, good.message) == (True, "a1: approve recorded")
        assert (await handle.result()).outcome is RunOutcome.COMPLETED


CLI_BAD: dict[str, tuple[list[str], str]] = {
    "missing input": ([], "expected one JSON object"),
    "wrong shape": (["--input", '{"id": 1}'], "approval_id: Field required"),
    "a number": (["--input", "7"], "got 7"),
    "two inputs": (["--input", '"a1"', "--input", '"approve"'], 'got ["a1", "approve"]'),
    "bytes": (["--input", "approve", "--input-meta", "encoding=binary/plain"], "approve"),
    "null": (["--input", "", "--input-meta", "encoding=binary/null"], "got null"),
    "unknown encoding": (["--input", "approve", "--input-meta", "encoding=application/x-test"], "application/x-test"),
    "protobuf": (["--input", "{}", "--input-meta", "encoding=json/protobuf"], "json/protobuf"),
}


async def test_whatever_the_temporal_cli_sends_is_noted_and_sticks_nothing(lite: Stage) -> None:
    world = World()
    async with lite.worker():
        handle = await asking(lite, world)
        before = await asked(handle)
        for name, (arguments, complaint) in CLI_BAD.items():
            sent = await temporal_cli(
                lite, "workflow", "signal", "--workflow-id", handle.id, "--name", "decide", *arguments
            )
            assert sent.returncode == 0, (name, sent.stderr)
            noted = await until(handle, lambda s, c=complaint: bool(s.notes) and c in s.notes[-1])
            assert noted.approvals == before, name
        assert len((await status(handle)).notes) == len(CLI_BAD)
        good = '{"approval_id": "a1", "verdict": "approve", "approver": "dr.lee"}'
        await temporal_cli(lite, "workflow", "signal", "--workflow-id", handle.id, "--name", "decide", "--input", good)
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
    assert world.log == ["begin send#1", "done send#1"]


async def test_a_signal_of_another_name_is_noted_whatever_it_carries(lite: Stage) -> None:
    async with lite.worker():
        handle = await asking(lite, World())
        await asked(handle)
        odd = ["--input", "no JSON", "--input-meta", "encoding=application/x-test"]
        for payload in ([], ["--input", json.dumps(YES)], odd):
            sent = await temporal_cli(
                lite, "workflow", "signal", "--workflow-id", handle.id, "--name", "decied", *payload
            )
            assert sent.returncode == 0, sent.stderr
        await handle.signal("x" * 500, YES)
        noted = await until(handle, lambda s: len(s.notes) == 2)  # three alike in a row are one note
        assert "signal 'decied' ignored: a run has no such signal; did you mean decide?" in noted.notes[0]
        assert "it takes decide and message" in noted.notes[0]
        assert len(noted.notes[1]) < 250
        await handle.signal("decide", YES)
        result = await handle.result()
    assert result.notes == noted.notes
    await replay((await handle.fetch_history()).to_json())


async def test_a_signal_before_the_first_task_is_noted_and_replays(lite: Stage) -> None:
    spec = agent(World().tool("send"))
    lite.model.script = sequence(call(("send", {})), say("ended"))
    handle = await lite.start(spec)
    await handle.signal("decied", YES)
    async with lite.worker():
        result = await handle.result()
    assert "signal 'decied' ignored" in result.notes[0]
    await replay((await handle.fetch_history()).to_json())


async def test_a_name_is_kept_without_the_spaces_around_it(lite: Stage) -> None:
    async with lite.worker():
        handle = await asking(lite, World())
        await asked(handle)
        await handle.signal("decide", {**YES, "approver": "  dr.\n lee "})
        result = await handle.result()
    assert [each.decision.approver for each in result.decisions] == ["dr. lee"]


async def test_after_the_end_it_is_refused_by_the_server_and_changes_nothing(lite: Stage) -> None:
    async with lite.worker():
        handle = await asking(lite, World())
        await asked(handle)
        await handle.signal("decide", YES)
        result = await handle.result()
        with pytest.raises(RPCError) as caught:
            await handle.signal("decide", YES)
        assert caught.value.status is RPCStatusCode.NOT_FOUND
        assert await lite.stored(handle) == result


async def test_while_the_run_unwinds_it_comes_too_late(lite: Stage) -> None:
    world, gate = World(), asyncio.Event()
    held = world.tool("book")

    async def slow_undo(ctx: Any, undo: Any) -> str:
        world.log.append("undo begins")
        await gate.wait()
        return "ok"

    held.undo(slow_undo)
    spec = agent(held, world.tool("send", approval=True))
    lite.model.script = sequence(call(("book", {})), call(("send", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        await asked(handle)
        await handle.cancel()
        await world.saw("undo begins")
        reply = await handle.execute_update("decide", {**YES, "approval_id": "a2"}, result_type=DecisionReply)
        gate.set()
        await cancelled(handle)
    assert not reply.accepted
    assert "no approval 'a2' is open" in reply.message
    assert "begin send#2" not in world.log
