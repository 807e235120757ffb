"""A batch: a run for each item, a window of them at a time; one bad item sinks nothing."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from temporalio.client import WorkflowExecutionStatus

from holdfast.authoring import registry
from holdfast.authoring.agent import AgentSpec, BreakerRule, Service
from holdfast.authoring.tools import ToolContext, tool
from holdfast.cli import runs
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ToolFailed
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import Items, Phase, RunOutcome
from holdfast.recovery.dead_letters import DeadLetters
from holdfast.state.runs import Runs
from holdfast.testing.model import call, say, sequence, turn
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, cancelled, failure, retried, status, until
from tests.fixtures.batch import Batch, Work, names
from tests.fixtures.world import World, agent


@dataclass
class Desk:
    """A tool that works at each name, and how many of them were at work at once."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    now: int = 0
    most: int = 0
    done: list[str] = field(default_factory=list)

    def agent(self, stage: Stage, bad: Sequence[str] = (), **more: Any) -> AgentSpec:
        @tool(effect=Effect.IDEMPOTENT, service="")
        async def work(ctx: ToolContext, name: str) -> str:
            """Works."""
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                await self.gate.wait()
                if name in bad:
                    raise ToolFailed(f"{name} is no name")
                self.done.append(name)
                return "done"
            finally:
                self.now -= 1

        stage.model.script = by_name("work")
        return agent(work, input=Work, prompt=lambda given: given.name, **more)


def by_name(tool_name: str, arguments: Json | None = None) -> Any:
    """The model calls the tool with the name it is given, then says that it is done."""

    def script(messages: list[dict[str, Any]]) -> Any:
        given = {"name": messages[1]["content"]} if arguments is None else arguments
        return say("done") if turn(messages) > 1 else call((tool_name, given))

    return script


async def test_a_signal_to_the_batch_is_noted_and_says_where_to_send_it(lite: Stage):
    desk = Desk()
    batch = Batch.of(desk.agent(lite))
    async with lite.worker():
        handle = await batch.start(lite, names(1))
        await handle.signal("decide", {"approval_id": "a1"})
        noted = await until(handle, lambda now: bool(now.notes))
        assert "signal 'decide' ignored: a batch has no such signal" in noted.notes[0]
        assert "send it to one of its runs" in noted.notes[0]
        desk.gate.set()
        await handle.result()


async def test_follow_says_which_of_its_runs_ask_a_person(lite: Stage, capsys: pytest.CaptureFixture[str]):
    world = World()
    send = world.tool("send", approval=True)
    lite.model.script = by_name("send", {})
    batch = Batch.of(agent(send, input=Work, prompt=lambda given: given.name))
    async with lite.worker():
        handle = await batch.start(lite, names(2))
        following = asyncio.create_task(runs.watch(lite.client, handle, False))
        said = ""
        async with asyncio.timeout(PATIENCE_S):
            while said.count("asks a person") < 2:
                await asyncio.sleep(0.05)
                said += capsys.readouterr().err
        found, _ = await runs.waiting(lite.client, handle.id)
        for child, approval in found:
            assert (
                f"asks: {child} asks a person; to read and answer it: uv run starter.py approvals {handle.id}" in said
            )
            yes = {"approval_id": approval.id, "verdict": "approve", "approver": "dr.lee"}
            await lite.client.get_workflow_handle(child).signal("decide", yes)
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
        await following
    assert said.count("asks a person") == 2


async def test_every_item_is_done_once_within_the_window_and_reported_on_the_way(lite: Stage):
    desk = Desk()
    batch = Batch.of(desk.agent(lite), window=3)
    async with lite.worker():
        handle = await batch.start(lite, names(10))
        seen = await until(handle, lambda now: now.items is not None and now.items.open == 3)
        assert "0/10 names, 3 at work" in seen.line
        async with asyncio.timeout(PATIENCE_S):
            while desk.now < 3:
                await asyncio.sleep(0.01)
        desk.gate.set()
        result = await handle.result()
    assert sorted(desk.done) == names(10)
    assert desk.most == 3
    assert (result.outcome, result.items, result.percent) == (RunOutcome.COMPLETED, Items(total=10, done=10), 100)
    assert result.summary == "10 names. reported 10"
    assert [report.ended for report in batch.reports] == [False] * (len(batch.reports) - 1) + [True]
    assert len(batch.reports) >= 2
    assert (result.calls, result.usage.calls) == (10, 20)
    assert await lite.stored(handle) == result


async def test_a_bad_item_is_counted_named_and_kept_and_the_others_are_done(lite: Stage):
    desk = Desk()
    desk.gate.set()
    batch = Batch.of(desk.agent(lite, bad=["n03"]), window=4)
    async with lite.worker():
        handle = await batch.start(lite, names(8))
        result = await handle.result()
    assert result.outcome is RunOutcome.PARTIAL
    assert result.items == Items(total=8, done=7, failed=1)
    assert result.reason.startswith("1 of 8 names failed: N03 (work")
    assert "n03 is no name" in result.reason
    (letter,) = await DeadLetters(lite.runtime.db).find()
    assert letter.workflow_id == f"{handle.id}.n03"
    assert letter.details["input"] == {"name": "n03"}
    assert batch.reports[-1].failures[0].name == "N03"


async def test_a_child_that_is_terminated_counts_as_failed(lite: Stage):
    desk = Desk()
    batch = Batch.of(desk.agent(lite), window=2)
    async with lite.worker():
        handle = await batch.start(lite, names(3))
        await until(handle, lambda now: now.items is not None and now.items.open == 2)
        await lite.client.get_workflow_handle(f"{handle.id}.n00").terminate()
        await until(handle, lambda now: now.items is not None and now.items.failed == 1)
        desk.gate.set()
        result = await handle.result()
    assert (result.outcome, result.reason) == (RunOutcome.PARTIAL, "1 of 3 names failed: N00 (terminated outside)")


async def test_a_child_that_waits_for_a_person_gives_its_place_until_it_is_answered(lite: Stage):
    world = World()
    spec = agent(world.tool("sign", approval=True), input=Work)
    lite.model.script = sequence(call(("sign", {})), say("done"))
    batch = Batch.of(spec, window=2, most_open=5)
    async with lite.worker():
        handle = await batch.start(lite, names(7))
        full = await until(handle, lambda now: now.items is not None and now.items.parked == 5)
        assert full.items == Items(total=7, open=5, parked=5)
        assert full.phase is Phase.PARKED
        yes = {"approval_id": "a1", "verdict": "approve", "approver": "x"}
        for name in names(7):
            child = lite.client.get_workflow_handle(f"{handle.id}.{name}")
            async with asyncio.timeout(PATIENCE_S):
                while not (await lite.client.count_workflows(f'WorkflowId = "{child.id}"')).count:
                    await asyncio.sleep(0.02)
            await until(child, lambda now: bool(now.approvals))
            await child.signal("decide", yes)
        result = await handle.result()
    assert (result.outcome, result.items) == (RunOutcome.COMPLETED, Items(total=7, done=7))


async def test_while_a_service_is_down_others_are_begun_and_its_children_fill_no_history(lite: Stage):
    name, up, read = f"svc-{uuid.uuid4().hex[:8]}", asyncio.Event(), []

    @tool(effect=Effect.IDEMPOTENT, service="")
    async def fetch(ctx: ToolContext, name: str) -> str:
        """Fetches."""
        read.append(name)
        return "fetched"

    @tool(effect=Effect.IDEMPOTENT, service=name, deferrable=False, retries=50)
    async def think(ctx: ToolContext, name: str) -> str:
        """Thinks."""
        if not up.is_set():
            raise httpx2.ConnectError("gone")
        return "thought"

    def script(messages: list[dict[str, Any]]) -> Any:
        given = {"name": messages[1]["content"]}
        return [call(("fetch", given)), call(("think", given)), say("done")][turn(messages) - 1]

    lite.model.script = script
    service = Service(name, breaker=BreakerRule(failures=1, probe_after_s=2.0))
    spec = agent(fetch, think, input=Work, prompt=lambda given: given.name, services=(service,))
    batch = Batch.of(spec, window=2, most_open=6)
    async with lite.worker():
        handle = await batch.start(lite, names(8))
        await until(handle, lambda now: now.items is not None and now.items.parked == 6)
        assert sorted(read) == names(6)
        before = (await handle.describe()).history_length
        await asyncio.sleep(2.5)  # each of the six has been tried again meanwhile
        assert (await handle.describe()).history_length - before <= 1
        up.set()
        result = await handle.result()
    assert (result.outcome, result.items) == (RunOutcome.COMPLETED, Items(total=8, done=8))


async def test_cancelling_starts_nothing_more_and_undoes_what_the_children_did(lite: Stage):
    world = World()
    spec = agent(world.tool("place"), world.tool("sign", approval=True), input=Work)
    lite.model.script = sequence(call(("place", {})), call(("sign", {})))
    batch = Batch.of(spec, window=2, most_open=3)
    async with lite.worker():
        handle = await batch.start(lite, names(9))
        await until(handle, lambda now: now.items is not None and now.items.parked == 3)
        await handle.cancel()
        await cancelled(handle)
        result = await lite.stored(handle)
    assert result.outcome is RunOutcome.CANCELLED
    assert result.items == Items(total=9)
    assert world.log.count("undo place#1") == 3
    for name in names(3):
        child = await lite.client.get_workflow_handle(f"{handle.id}.{name}").describe()
        assert child.status is WorkflowExecutionStatus.CANCELED
    assert batch.reports[-1].ended


@pytest.mark.parametrize("heard", [True, False], ids=["while it lists", "as it has listed"])
async def test_a_batch_that_is_cancelled_while_it_lists_starts_nothing(lite: Stage, heard: bool):
    desk, begun, end = Desk(), threading.Event(), threading.Event()
    batch = Batch.of(desk.agent(lite))
    batch.listing = lambda: (begun.set(), end.wait(PATIENCE_S), None)[2]
    async with lite.worker():
        handle = await batch.start(lite, names(3))
        await asyncio.to_thread(begun.wait, PATIENCE_S)
        await handle.cancel()
        if not heard:
            end.set()  # before the activity's next heartbeat, with which it would hear of it
        await cancelled(handle)
        end.set()
        result = await lite.stored(handle)
    assert (result.outcome, result.reason) == (RunOutcome.CANCELLED, "cancelled")
    assert not await Runs(lite.runtime.db).recent(10, batch=handle.id)


async def test_items_that_vanish_before_their_turn_are_told(lite: Stage):
    desk = Desk()
    batch = Batch.of(desk.agent(lite), window=2, items_per_execution=2)
    async with lite.worker():
        handle = await batch.start(lite, names(6))
        await until(handle, lambda now: now.items is not None and now.items.open == 2)
        batch.gone.update(names(6)[4:])
        desk.gate.set()
        result = await handle.result()
    assert result.items == Items(total=4, done=4)
    assert any("2 of the names are no longer in the list" in note for note in result.notes)


async def test_a_long_batch_continues_as_new_and_does_every_item_once(lite: Stage):
    desk = Desk()
    desk.gate.set()
    batch = Batch.of(desk.agent(lite, bad=["n07"]), window=3, items_per_execution=5)
    async with lite.worker():
        handle = await batch.start(lite, names(17))
        first = (await handle.describe()).run_id
        result = await handle.result()
        last = (await handle.describe()).run_id
    assert first != last
    assert sorted([*desk.done, "n07"]) == names(17)
    assert result.items == Items(total=17, done=16, failed=1)
    assert "n07 is no name" in result.reason
    assert (result.calls, result.usage.calls) == (17, 33)


async def test_a_batch_that_cannot_be_listed_or_has_nothing_fails_with_words(lite: Stage):
    batch = Batch.of(Desk().agent(lite))
    async with lite.worker():
        refused = await failure(await batch.start(lite, ["nothing"]))
        empty = await failure(await batch.start(lite, []))
    assert refused.reason == "the items cannot be listed: there is no such folder"
    assert empty.reason == "there are no names"
    letters = await DeadLetters(lite.runtime.db).find()
    assert {letter.subject for letter in letters} == {batch.spec.name}


async def test_a_batch_that_begins_before_a_worker_knows_it_waits_for_one_that_does(lite: Stage):
    batch = Batch.of(agent(World().tool("work")))
    lite.model.script = sequence(call(("work", {})), say("done"))
    handle = await batch.start(lite, names(1))
    registry._added_batches.pop(batch.spec.name)  # pyright: ignore[reportPrivateUsage]
    async with lite.worker():
        await retried(handle)
        registry.add_batch(batch.spec)
        result = await handle.result()
    assert (result.outcome, result.items) == (RunOutcome.COMPLETED, Items(total=1, done=1))


async def test_when_all_items_fail_the_batch_fails(lite: Stage):
    desk = Desk()
    desk.gate.set()
    batch = Batch.of(desk.agent(lite, bad=names(2)))
    async with lite.worker():
        result = await failure(await batch.start(lite, names(2)))
    assert result.items == Items(total=2, failed=2)


async def test_the_same_key_is_the_same_batch(lite: Stage):
    desk = Desk()
    desk.gate.set()
    batch = Batch.of(desk.agent(lite))
    async with lite.worker():
        one, two = await asyncio.gather(*(batch.start(lite, names(3), key="march") for _ in range(2)))
        await one.result()
        three = await batch.start(lite, names(3), key="march")
        await three.result()
    assert one.id == two.id == three.id == f"{batch.spec.name}-march"
    assert sorted(desk.done) == names(3)


async def test_the_runs_of_a_batch_are_listed_apart(lite: Stage):
    desk = Desk()
    desk.gate.set()
    batch = Batch.of(desk.agent(lite))
    async with lite.worker():
        handle = await batch.start(lite, names(3))
        await handle.result()
    runs = Runs(lite.runtime.db)
    assert [run.workflow_id for run in await runs.recent(10)] == [handle.id]
    assert {run.workflow_id for run in await runs.recent(10, batch=handle.id)} == {
        f"{handle.id}.{name}" for name in names(3)
    }


async def test_news_of_a_child_that_come_in_the_wrong_order_or_are_none_change_nothing(lite: Stage):
    desk = Desk()
    batch = Batch.of(desk.agent(lite), window=2)
    async with lite.worker():
        handle = await batch.start(lite, names(4))
        await until(handle, lambda now: now.items is not None and now.items.open == 2)
        child = f"{handle.id}.n00"
        for news in ({"id": child, "n": 2}, {"id": child, "n": 1}, {"id": "else", "n": 1}, "nonsense"):
            await handle.signal("child", news)
        assert (await status(handle)).items == Items(total=4, open=2)
        desk.gate.set()
        assert (await handle.result()).outcome is RunOutcome.COMPLETED


@pytest.mark.parametrize("workers", [0, 1000])
async def test_a_batch_replays_from_its_history_whatever_is_cached(lite: Stage, workers: int):
    desk = Desk()
    desk.gate.set()
    batch = Batch.of(desk.agent(lite, bad=["n01"]), window=2)
    async with lite.worker(max_cached_workflows=workers):
        result = await (await batch.start(lite, names(6))).result()
    assert result.items == Items(total=6, done=5, failed=1)


async def test_an_item_whose_run_is_there_already_is_not_done_again(lite: Stage):
    desk = Desk()
    desk.gate.set()
    batch = Batch.of(desk.agent(lite))
    await lite.client.start_workflow(
        "AgentWorkflow",
        {"agent": batch.spec.agent.name, "input": {"name": "n01"}},
        id=f"{batch.spec.name}-k.n01",
        task_queue=lite.queue,
    )
    async with lite.worker():
        result = await (await batch.start(lite, names(3), key="k")).result()
    assert sorted(desk.done) == names(3)
    assert result.reason == f"1 of 3 names failed: N01 (there is a run {batch.spec.name}-k.n01 already)"


async def test_the_children_of_a_terminated_batch_undo_what_they_did(lite: Stage):
    world = World()
    spec = agent(world.tool("place"), world.tool("sign", approval=True), input=Work)
    lite.model.script = sequence(call(("place", {})), call(("sign", {})))
    batch = Batch.of(spec, window=2, most_open=2)
    async with lite.worker():
        handle = await batch.start(lite, names(5))
        await until(handle, lambda now: now.items is not None and now.items.parked == 2)
        await handle.terminate()
        for name in names(2):
            await cancelled(lite.client.get_workflow_handle(f"{handle.id}.{name}"))
    assert world.log.count("undo place#1") == 2
