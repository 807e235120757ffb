"""Payloads beyond Temporal's 2 MB, both ways: nothing gets stuck, and whoever sent too much reads how much is taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from temporalio.client import Client, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Replayer

from holdfast.authoring.tools import Tool, ToolContext, Undo, tool
from holdfast.cli.stuck import failing_task, words
from holdfast.contracts.people import ApprovalDecision, DecisionReply, Verdict
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import RunOutcome
from holdfast.engine.client import sandbox
from holdfast.engine.executions import describe
from holdfast.engine.starting import BadRequest, start_run
from holdfast.state.runs import Runs
from holdfast.testing.model import Message, call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, a_runtime, failure, until
from tests.fixtures.payloads import deployed
from tests.fixtures.temporal import temporal_cli
from tests.fixtures.world import agent
from workflows.agent import AgentWorkflow

HUGE = "y" * 5_000_000


class Words(BaseModel):
    text: str = ""


@pytest.fixture
async def one(temporal: WorkflowEnvironment, store_url: str) -> AsyncIterator[Stage]:
    """A stage with the claim check, on either store."""
    async with deployed(temporal, store_url) as client, a_runtime(store_url) as (runtime, model):
        yield Stage(client, runtime, model)


def says(size: int, approval: bool = False) -> Tool:
    @tool(effect=Effect.IDEMPOTENT, service="big", approval=approval)
    async def act(ctx: ToolContext, text: str = "") -> str:
        """Answers at length."""
        return f"{len(text)} bytes came; " + "z" * size

    @act.undo
    async def revert(ctx: ToolContext, undo: Undo) -> str:
        return f"undone: {undo.result}"

    return act


def heard(stage: Stage, role: str = "tool") -> list[str]:
    """What the model was told last, by this role."""
    return [m["content"] for m in stage.model.requests[-1][1] if m["role"] == role]


def signal(handle: WorkflowHandle[Any, Any], folder: Path, text: str) -> list[str]:
    """The arguments of `temporal` that send a decision which is too long for a command line."""
    (folder / "decision.json").write_text(text)
    to = ["--workflow-id", handle.id, "--name", "decide"]
    return ["workflow", "signal", *to, "--input-file", str(folder / "decision.json")]


async def replays(stage: Stage, handle: WorkflowHandle[Any, Any]) -> None:
    converter = stage.client.data_converter
    replayer = Replayer(workflows=[AgentWorkflow], workflow_runner=sandbox(), data_converter=converter)
    await replayer.replay_workflow(await handle.fetch_history())


async def test_a_result_of_5_mb_is_cut_for_the_model_with_its_size_and_undone_whole(one: Stage) -> None:
    one.model.script = sequence(call(("act", {})), call(("act", {})), say("done"))
    spec = agent(says(len(HUGE)), steps=[], max_turns=2)
    async with one.worker():
        handle = await one.start(spec)
        result = await failure(handle)
    assert "max turns" in result.reason
    [answer] = heard(one)
    assert len(answer) < 101_000
    assert answer.endswith("[cut: the result has 5000014 bytes, 100000 are shown; ask for less]")
    assert [undo.status for undo in result.undone] == ["undone", "undone"]
    assert all(len(undo.note) < 3_000 for undo in result.undone)


async def test_arguments_of_5_mb_go_back_to_the_model_with_the_limit_and_it_sends_less(one: Stage) -> None:
    def script(messages: list[Message]) -> Message:
        told = [m for m in messages if m["role"] == "tool"]
        return [call(("act", {"text": HUGE})), call(("act", {"text": "y" * 900_000})), say("done")][min(len(told), 2)]

    one.model.script = script
    async with one.worker():
        handle = await one.start(agent(says(3), steps=[]))
        result = await handle.result()
        await replays(one, handle)
    assert (result.outcome, result.calls) == (RunOutcome.COMPLETED, 1)
    refused, done = heard(one)
    assert refused == "error: the arguments of act have 5,000,012 bytes, and at most 1,000,000 are taken: send less"
    assert done == "900000 bytes came; zzz"


async def test_calls_that_are_too_large_together_go_back_to_the_model_and_it_sends_fewer(one: Stage) -> None:
    def script(messages: list[Message]) -> Message:
        told = [m for m in messages if m["role"] == "tool"]
        if len(told) > 75:
            return say("done")
        return call(*[("act", {"text": f"{n:05}" * 12_000}) for n in range(3 if told else 75)])

    one.model.script = script
    async with one.worker():
        result = await (await one.start(agent(says(3), steps=[], max_calls=75))).result()
    assert (result.outcome, result.calls) == (RunOutcome.COMPLETED, 3)
    assert heard(one)[0] == (
        "error: not run: the arguments of all calls together have 4,500,900 bytes, and at most 2,000,000 are taken: "
        "send fewer calls at a time"
    )


async def test_final_words_of_5_mb_are_asked_for_again_and_then_the_run_fails_in_words(one: Stage) -> None:
    one.model.script = sequence(say(HUGE), say("y" * 900_000))
    async with one.worker():
        result = await (await one.start(agent(says(3), steps=[]))).result()
        assert len(result.summary) == 900_000
        assert heard(one, "user")[-1] == (
            "Your answer has 5,000,000 bytes, and at most 1,000,000 are taken: say it shorter."
        )
        one.model.script = sequence(say(HUGE))
        result = await failure(await one.start(agent(says(3), steps=[])))
    assert "invalid 3 times in a row; the last error: Your answer has 5,000,000 bytes, and at most" in result.reason


async def test_an_input_of_3_mb_runs_and_one_of_5_mb_is_refused_at_the_door(one: Stage) -> None:
    spec = agent(says(3), steps=[], input=Words)
    runs = Runs(one.runtime.db)
    async with one.worker():
        started = await start_run(one.client, runs, spec.name, {"text": HUGE[:3_000_000]}, task_queue=one.queue)
        handle = one.client.get_workflow_handle_for(AgentWorkflow.run, started.workflow_id)
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
        [prompt] = heard(one, "user")
        assert len(prompt) > 3_000_000
        described = await handle.describe()
        assert described.raw_description.workflow_execution_info.history_size_bytes < 50_000
        await replays(one, handle)
    with pytest.raises(BadRequest, match="has 5,000,012 bytes, and at most 4,000,000 are taken: leave it where"):
        await start_run(one.client, runs, spec.name, {"text": HUGE}, task_queue=one.queue)


async def test_a_decision_of_5_mb_changes_nothing_and_is_noted_with_its_size(one: Stage, tmp_path: Path) -> None:
    one.model.script = sequence(call(("act", {})), say("done"))
    async with one.worker():
        handle = await one.start(agent(says(3, approval=True), steps=[]))
        await until(handle, lambda now: bool(now.approvals))
        large = ApprovalDecision(approval_id="a1", verdict=Verdict.APPROVE, approver="dr.lee", result=HUGE)
        with pytest.raises(WorkflowUpdateFailedError):  # history could not hold it, so the worker takes it out
            await handle.execute_update("decide", large, result_type=DecisionReply)
        await handle.signal("decide", large)
        await handle.signal("decide", large.model_copy(update={"result": None, "approval_id": HUGE[:1_500_000]}))
        now = await until(handle, lambda now: len(now.notes) == 2)
        assert "decision ignored: it has 5," in now.notes[0]
        assert all(len(note) < 3_000 for note in now.notes)
        typed = large.model_dump_json()
        sent = await temporal_cli(one, *signal(handle, tmp_path, typed))
        assert sent.returncode != 0
        assert "larger than max" in sent.stderr or "exceeds size limit" in sent.stderr
        right = ApprovalDecision(approval_id="a1", verdict=Verdict.APPROVE, approver="dr.lee")
        assert (await handle.execute_update("decide", right, result_type=DecisionReply)).accepted
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
        await replays(one, handle)


async def test_without_a_large_payload_a_run_waits_says_which_and_goes_on_when_it_is_back(
    temporal: WorkflowEnvironment, sqlite_url: str, tmp_path: Path
) -> None:
    place = tmp_path / "claims"
    spec = agent(says(3), steps=[], input=Words)
    async with (
        deployed(temporal, sqlite_url, payload_store=f"file://{place}") as client,
        a_runtime(sqlite_url) as (runtime, model),
    ):
        one = Stage(client, runtime, model)
        handle = await one.start(spec, {"text": HUGE[:200_000]})
        place.rename(tmp_path / "away")
        async with one.worker():
            async with asyncio.timeout(PATIENCE_S):
                while not (said := await failing_task(client, await describe(client, handle.id))):
                    await asyncio.sleep(0.05)
            assert f"is not in {place}: bring it back there" in said
            (tmp_path / "away").rename(place)
            assert (await handle.result()).outcome is RunOutcome.COMPLETED


async def test_an_activity_without_its_large_payload_says_so_and_waits_for_it(
    temporal: WorkflowEnvironment, sqlite_url: str, tmp_path: Path
) -> None:
    place = tmp_path / "claims"
    async with (
        deployed(temporal, sqlite_url, payload_store=f"file://{place}") as client,
        a_runtime(sqlite_url) as (runtime, model),
    ):
        one = Stage(client, runtime, model)
        model.script = sequence(call(("act", {"text": HUGE[:200_000]})), say("done"))
        async with one.worker(workflows_only=True):
            handle = await one.start(agent(says(3), steps=[], input=Words), {"text": HUGE[:200_000]})
            while not (await handle.describe()).raw_description.pending_activities:
                await asyncio.sleep(0.02)
            place.rename(tmp_path / "away")
            async with one.worker(activities_only=True):
                async with asyncio.timeout(PATIENCE_S):
                    while not (said := await lacking(client, handle)):
                        await asyncio.sleep(0.05)
                assert f"is not in {place}: bring it back there" in said
                (tmp_path / "away").rename(place)
                assert (await handle.result()).outcome is RunOutcome.COMPLETED


async def lacking(client: Client, handle: WorkflowHandle[Any, Any]) -> str:
    """What the activity of a run fails with."""
    [pending] = (await handle.describe()).raw_description.pending_activities
    return await words(client, pending.last_failure) if pending.HasField("last_failure") else ""
