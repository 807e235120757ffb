"""After the end of a run: dead letters, their replay under the same keys, and what a person finds out."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from temporalio.api.sdk.v1 import WorkflowMetadata
from temporalio.client import WorkflowHandle

from holdfast.authoring import registry
from holdfast.authoring.tools import Tool
from holdfast.contracts.failures import ToolFailed
from holdfast.contracts.profile import Effect, StepSpec
from holdfast.contracts.recovery import Action, Repair, RepairResult
from holdfast.contracts.run import RunOutcome, RunResult, StepStatus
from holdfast.contracts.tool_call import UndoStatus
from holdfast.engine.starting import BadRequest
from holdfast.recovery.dead_letters import DeadLetter, DeadLetters, LetterKind, LetterState
from holdfast.recovery.requests import repair_of, replay_run, start_repair
from holdfast.reliability.ledger import State
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, cancelled, failure, until
from tests.fixtures.world import World, agent
from tests.integration.workflows.test_orphans import sweep

ORDER = StepSpec(name="pharmacy", tools=["order"], critical=False, role="pharmacist")


def letters(stage: Stage) -> DeadLetters:
    return DeadLetters(stage.runtime.db)


async def only_letter(stage: Stage, agent: str = "") -> DeadLetter:
    (found,) = await letters(stage).find(agent=agent)
    return found


async def replay(stage: Stage, letter: DeadLetter) -> RepairResult:
    repair = await repair_of(letter, stage.runtime.db, "dr.lee")
    return await (await start_repair(stage.client, repair, stage.queue)).result()


async def partial_run(stage: Stage, order: Tool, *more: Tool) -> WorkflowHandle[Any, RunResult]:
    """A run that ends with its optional step `pharmacy` left pending."""
    steps = [ORDER, *(StepSpec(name=t.name, tools=[t.name]) for t in more)]
    stage.model.script = sequence(call((order.name, {}), *((t.name, {}) for t in more)), say("done but for one"))
    handle = await stage.start(agent(order, *more, steps=steps))
    await asyncio.wait_for(handle.result(), PATIENCE_S)
    return handle


async def test_a_step_left_pending_is_done_later_under_its_first_key(stage: Stage) -> None:
    world = World()
    async with stage.worker():
        handle = await partial_run(stage, world.tool("order", errors=[ToolFailed("closed")]), world.tool("book"))
        assert (await stage.stored(handle)).outcome is RunOutcome.PARTIAL
        letter = await only_letter(stage)
        ended = await replay(stage, letter)
    result = await stage.stored(handle)
    assert ended.ok
    assert (ended.outcome, result.outcome, result.pending, result.reason) == ("completed", "completed", [], "")
    pharmacy = result.steps[0]
    assert (pharmacy.status, pharmacy.detail) == (StepStatus.DONE, "order replayed by dr.lee")
    assert result.percent == 100
    assert world.log.count("done order#1") == 1
    assert set(world.keys) == {f"{result.key_base}/1", f"{result.key_base}/2"}
    now = await only_letter(stage)
    assert (now.id, now.state, now.closed_at is not None) == (letter.id, LetterState.REPLAYED, True)


async def test_a_letter_holds_what_a_person_has_to_know(lite: Stage) -> None:
    world = World()
    failing = [ConnectionRefusedError("pharmacy is down")] * 2
    async with lite.worker():
        handle = await partial_run(lite, world.tool("order", errors=failing, retries=1))
        letter = await only_letter(lite)
    base = (await lite.stored(handle)).key_base
    assert (letter.kind, letter.state, letter.workflow_id, letter.key) == ("call", "open", handle.id, f"{base}/1")
    assert (letter.subject, letter.role) == ("order", "pharmacist")
    assert "pharmacy is down" in letter.cause
    details = letter.details
    assert [("pharmacy is down" in each["error"], each["at"] > 0) for each in details["attempts"]] == [(True, True)] * 2
    assert (details["step"], details["arguments"], details["keys"]) == ("pharmacy", {"n": 0}, [f"{base}/1"])


async def test_a_replay_that_fails_again_leaves_the_letter_open_with_the_new_cause(lite: Stage) -> None:
    world = World()
    async with lite.worker():
        errors = [ToolFailed("closed"), ToolFailed("still closed")]
        handle = await partial_run(lite, world.tool("order", errors=errors))
        ended = await replay(lite, await only_letter(lite))
        letter = await only_letter(lite)
        assert (ended.ok, letter.state, "still closed" in letter.cause) == (False, "open", True)
        assert "still closed" in (await lite.stored(handle)).pending[0].what
        assert (await replay(lite, letter)).ok  # and once more
    assert (await lite.stored(handle)).outcome is RunOutcome.COMPLETED


async def test_a_repair_that_is_cancelled_in_the_middle_records_what_it_did(lite: Stage) -> None:
    """A run that is cancelled begins nothing more; a repair has one thing to do, and a letter to close."""
    world, gate = World(), asyncio.Event()
    order = world.tool("order", gate=gate, errors=[ToolFailed("out of stock")], timeout=60)
    async with lite.worker():
        gate.set()
        await partial_run(lite, order)
        gate.clear()
        letter = await only_letter(lite)
        handle = await start_repair(lite.client, await repair_of(letter, lite.runtime.db, "dr.lee"), lite.queue)
        async with asyncio.timeout(PATIENCE_S):
            while world.log.count("begin order#1") < 2:
                await asyncio.sleep(0.02)
        await handle.cancel()
        asyncio.get_running_loop().call_later(1.5, gate.set)  # past the next heartbeats, which tell of the cancel
        assert (await handle.result()).ok
        assert (await only_letter(lite)).state == LetterState.REPLAYED
    assert world.log.count("done order#1") == 1


async def test_a_letter_is_not_replayed_twice_at_once(lite: Stage) -> None:
    world, gate = World(), asyncio.Event()
    async with lite.worker():
        await partial_run(lite, world.tool("order", errors=[ToolFailed("closed")]))
        letter = await only_letter(lite)
        slow = world.tool("order", gate=gate)
        registry.add(replace(registry.agent(letter.agent), tools=(slow,)))
        repair = await repair_of(letter, lite.runtime.db, "dr.lee")
        first = await start_repair(lite.client, repair, lite.queue)
        await world.saw("begin order#1")
        with pytest.raises(BadRequest, match="is being repaired at this moment"):
            await start_repair(lite.client, repair, lite.queue)
        gate.set()
        assert (await first.result()).ok


async def test_an_unknown_manual_call_is_never_replayed_blindly(lite: Stage) -> None:
    world = World()
    send = world.tool("send", Effect.MANUAL, gate=asyncio.Event(), timeout=0.2, undo=None)
    steps = [StepSpec(name="tell", tools=["send"], critical=False, role="nurse")]
    lite.model.script = sequence(call(("send", {})), say("could not be sure"))
    async with lite.worker():
        handle = await lite.start(agent(send, steps=steps))
        await handle.result()
        letter = await only_letter(lite)
        with pytest.raises(BadRequest, match=rf"it is unknown whether send happened.*settle {handle.id}"):
            await replay(lite, letter)
        # Not even by a workflow that was started past the door.
        action = Action(do="call", key=letter.key, seq=1, tool="send", arguments={"n": 0})
        past = Repair(workflow_id=handle.id, key_base=letter.key_base, agent=letter.agent, letter="x", actions=[action])
        with pytest.raises(Exception, match="Workflow execution failed"):
            await (await start_repair(lite.client, past, lite.queue)).result()
    assert world.log == ["begin send#1"]


@pytest.mark.parametrize("happened", [True, False])
async def test_a_person_settles_after_the_end(stage: Stage, happened: bool) -> None:
    world = World()
    never = asyncio.Event()
    send = world.tool("send", Effect.MANUAL, gate=never, timeout=0.2, undo=None)
    steps = [StepSpec(name="tell", tools=["send"], critical=False, role="nurse")]
    stage.model.script = sequence(call(("send", {})), say("could not be sure"))
    async with stage.worker():
        handle = await stage.start(agent(send, steps=steps))
        await handle.result()
        letter = await only_letter(stage)
        finding = Action(
            do="settle",
            key=letter.key,
            seq=1,
            tool="send",
            step="tell",
            happened=happened,
            result={"id": 7},
            comment="c",
        )
        assert (await (await start_repair(stage.client, settling(letter, finding), stage.queue)).result()).ok
        row = await stage.runtime.ledger.entry(letter.key)
        result, now = await stage.stored(handle), await only_letter(stage)
        assert row is not None
        if happened:
            assert (row.state, row.settled and row.settled.result) == (State.DONE, {"id": 7})
            assert (result.outcome, result.steps[0].status, now.state) == ("completed", StepStatus.DONE, "settled")
            assert result.steps[0].detail == "settled by dr.lee: it happened. c"
        else:
            assert (row.state, result.outcome, now.state) == (State.FAILED, "partial", "open")
            assert "did not happen" in now.cause
            never.set()  # now that it is known, it may be done
            assert (await replay(stage, now)).ok
            assert (await stage.stored(handle)).outcome is RunOutcome.COMPLETED
    assert world.log.count("done send#1") == (0 if happened else 1)


async def test_a_compensation_that_failed_is_a_letter_and_its_replay_undoes_once(stage: Stage) -> None:
    world = World()
    failing = [ToolFailed("desk is closed")]
    spec = agent(world.tool("book", undo=failing), world.tool("send", approval=True))
    stage.model.script = sequence(call(("book", {})), call(("send", {})), say("done"))
    async with stage.worker():
        handle = await stage.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        await handle.cancel()
        await cancelled(handle)
        letter = await only_letter(stage)
        assert (letter.kind, letter.subject, "desk is closed" in letter.cause) == (LetterKind.UNDO, "book", True)
        assert [str(each) for each in (await stage.stored(handle)).stands] == ["book #1"]
        ended = await replay(stage, letter)
    assert ended.ok
    assert world.log[-2:] == ["undo of book#1 fails", "undo book#1"]
    result = await stage.stored(handle)
    assert (result.outcome, [(u.tool, u.status) for u in result.undone]) == ("cancelled", [("book", UndoStatus.UNDONE)])
    assert result.steps[0].status is StepStatus.UNDONE
    assert result.stands == []
    assert (await only_letter(stage)).state == LetterState.REPLAYED


async def test_a_failed_run_is_replayed_and_what_still_stands_is_not_done_again(stage: Stage) -> None:
    world = World()
    spec = agent(
        world.tool("send", undo=None), world.tool("book"), world.tool("pay", errors=[ToolFailed("account closed")])
    )
    stage.model.script = sequence(call(("send", {})), call(("book", {})), call(("pay", {})), say("done"))
    async with stage.worker():
        handle = await stage.start(spec, {"what": "y"})
        before = await failure(handle)
        letter = await only_letter(stage)
        assert (letter.kind, letter.cause) == (LetterKind.RUN, before.reason)
        started = await replay_run(stage.client, stage.runtime.db, letter, "dr.lee", stage.queue)
        again = stage.client.get_workflow_handle(started.workflow_id, result_type=RunResult)
        with pytest.raises(BadRequest, match="was taken by another process just now"):
            await replay_run(stage.client, stage.runtime.db, letter, "dr.lee", stage.queue)
        result = await again.result()
    assert started.request_key == f"{handle.id}~1"
    assert result.outcome is RunOutcome.COMPLETED
    assert [entry for entry in world.log if entry.startswith("done send")] == ["done send#1"]
    assert world.log.count("undo book#2") == 1
    assert [entry for entry in world.log if entry.startswith("done")] == [
        "done send#1", "done book#2", "done book#2", "done pay#3"
    ]  # fmt: skip
    now = await only_letter(stage)
    assert (now.state, now.note) == (LetterState.REPLAYED, f"{started.workflow_id} ended completed")


async def test_a_replay_that_fails_brings_the_same_letter_up_to_date(lite: Stage) -> None:
    world = World()
    errors = [ToolFailed("account closed"), ToolFailed("still closed")]
    spec = agent(world.tool("send", undo=None), world.tool("pay", errors=errors))
    lite.model.script = sequence(call(("send", {})), call(("pay", {})), say("done"))
    async with lite.worker():
        handle = await lite.start(spec)
        await failure(handle)
        letter = await only_letter(lite)
        tries = [letter.key_base]
        for n in (1, 2):
            started = await replay_run(lite.client, lite.runtime.db, letter, "dr.lee", lite.queue)
            again = lite.client.get_workflow_handle(started.workflow_id, result_type=RunResult)
            assert started.request_key == f"{handle.id}~{n}"
            if n == 2:
                assert (await again.result()).outcome is RunOutcome.COMPLETED
                break
            await failure(again)
            letter = await only_letter(lite)
            tries.append(letter.key_base)
            assert (letter.state, letter.workflow_id, letter.details["tries"]) == ("open", again.id, tries)
            assert "still closed" in letter.cause
    assert [entry for entry in world.log if entry.startswith("done send")] == ["done send#1"]
    assert (await only_letter(lite)).state == LetterState.REPLAYED


async def test_a_failed_run_is_not_replayed_while_an_effect_is_unknown(lite: Stage) -> None:
    world = World()
    send = world.tool("send", Effect.MANUAL, gate=asyncio.Event(), timeout=0.2, undo=None)
    steps = [StepSpec(name="tell", tools=["send"], critical=False), StepSpec(name="pay", tools=["pay"])]
    lite.model.script = sequence(call(("send", {})), call(("pay", {})), say("done"))
    async with lite.worker():
        handle = await lite.start(agent(send, world.tool("pay", errors=[ToolFailed("closed")]), steps=steps))
        await failure(handle)
        found = {each.kind: each for each in await letters(lite).find()}
        assert set(found) == {LetterKind.RUN, LetterKind.CALL}
        run = found[LetterKind.RUN]
        with pytest.raises(BadRequest, match=rf"settle {handle.id} {found[LetterKind.CALL].key}"):
            await replay_run(lite.client, lite.runtime.db, run, "dr.lee", lite.queue)
        with pytest.raises(BadRequest, match="its run ended failed, so its calls are not made again"):
            await replay(lite, found[LetterKind.CALL])
        await lite.runtime.ledger.settle(found[LetterKind.CALL].key, True, "sent by phone", "")
        started = await replay_run(lite.client, lite.runtime.db, run, "dr.lee", lite.queue)
        again = lite.client.get_workflow_handle(started.workflow_id, result_type=RunResult)
        assert (await again.result()).outcome is RunOutcome.COMPLETED
    assert [entry for entry in world.log if "send" in entry] == ["begin send#1"]


async def test_an_owed_compensation_waits_while_a_replay_builds_on_its_effect(stage: Stage) -> None:
    world = World()
    book = world.tool("book", undo=[ToolFailed("desk is closed")])
    spec = agent(book, world.tool("send", approval=True), world.tool("pay", errors=[ToolFailed("closed")]))
    stage.model.script = sequence(call(("book", {})), call(("pay", {})), call(("send", {})), say("done"))
    async with stage.worker():
        await failure(await stage.start(spec))
        found = {each.kind: each for each in await letters(stage).find()}
        started = await replay_run(stage.client, stage.runtime.db, found[LetterKind.RUN], "dr.lee", stage.queue)
        again = stage.client.get_workflow_handle(started.workflow_id, result_type=RunResult)
        await until(again, lambda s: bool(s.approvals))
        owed = await letters(stage).get(found[LetterKind.UNDO].id)
        assert owed is not None
        with pytest.raises(BadRequest, match=f"{again.id} builds on its effect"):
            await replay(stage, owed)
        await again.signal("decide", {"approval_id": "a3", "verdict": "approve", "approver": "dr.lee"})
        assert (await again.result()).outcome is RunOutcome.COMPLETED
    assert {each.state for each in await letters(stage).find()} == {LetterState.REPLAYED}
    assert world.log.count("done book#1") == 1
    assert "undo book#1" not in world.log


async def test_a_read_left_pending_is_read_later(lite: Stage) -> None:
    world = World()
    async with lite.worker():
        down = [ConnectionRefusedError("pharmacy is down")] * 2
        handle = await partial_run(lite, world.tool("order", Effect.READ, errors=down, retries=1))
        assert (await replay(lite, await only_letter(lite))).ok
    assert (await lite.stored(handle)).outcome is RunOutcome.COMPLETED


async def test_what_stood_in_for_a_call_and_may_have_happened_is_settled_first(lite: Stage) -> None:
    world = World()
    phone = world.tool("phone", Effect.MANUAL, gate=asyncio.Event(), timeout=0.2, undo=None)
    async with lite.worker():
        order = world.tool("order", errors=[ToolFailed("closed")], fallback=(phone,))
        handle = await partial_run(lite, order)
        letter = await only_letter(lite)
        with pytest.raises(BadRequest, match=rf"settle {letter.key}/fb-1 first"):
            await replay(lite, letter)
        action = Action(do="settle", key=f"{letter.key}/fb-1", tool="phone", step="pharmacy", happened=True)
        repair = settling(letter, action)
        assert (await (await start_repair(lite.client, repair, lite.queue)).result()).ok
    assert (await lite.stored(handle)).outcome is RunOutcome.COMPLETED
    assert [entry for entry in world.log if entry.startswith("done")] == []


def settling(letter: DeadLetter, action: Action) -> Repair:
    return Repair(
        workflow_id=letter.workflow_id,
        key_base=letter.key_base,
        agent=letter.agent,
        by="dr.lee",
        letter=letter.id,
        actions=[action],
    )


async def test_a_replay_that_was_terminated_can_be_replayed_once_it_is_undone(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("pay", errors=[ToolFailed("closed")]), world.tool("send", approval=True))
    lite.model.script = sequence(call(("pay", {})), call(("send", {})), say("done"))

    async def again() -> WorkflowHandle[Any, RunResult]:
        started = await replay_run(lite.client, lite.runtime.db, await only_letter(lite), "dr.lee", lite.queue)
        return lite.client.get_workflow_handle(started.workflow_id, result_type=RunResult)

    async with lite.worker():
        await failure(await lite.start(spec))
        first = await again()
        with pytest.raises(BadRequest, match=f"is being replayed as {first.id}"):
            await again()
        await until(first, lambda s: bool(s.approvals))
        await first.terminate("by hand")
        with pytest.raises(BadRequest, match="orphans --fix"):
            await again()
        assert (await sweep(lite))[0].ok
        letter = await only_letter(lite)
        assert (letter.state, letter.details["replays"], len(letter.details["tries"])) == ("open", 1, 2)
        second = await again()
        await until(second, lambda s: bool(s.approvals))
        await second.signal("decide", {"approval_id": "a2", "verdict": "approve", "approver": "dr.lee"})
        assert (await second.result()).outcome is RunOutcome.COMPLETED
    assert second.id.endswith("~2")
    assert world.log == [
        *("begin pay#1", "begin pay#1", "done pay#1", "undo pay#1"),
        *("begin pay#1", "done pay#1", "begin send#2", "done send#2"),
    ]


async def test_a_repair_without_a_cached_workflow_is_the_same_and_says_what_it_did(lite: Stage) -> None:
    world = World()
    async with lite.worker(max_cached_workflows=0):
        handle = await partial_run(lite, world.tool("order", errors=[ToolFailed("closed")]))
        repair = await repair_of(await only_letter(lite), lite.runtime.db, "dr.lee")
        repairing = await start_repair(lite.client, repair, lite.queue)
        assert (await repairing.result()).ok
        told = await repairing.query("__temporal_workflow_metadata", result_type=WorkflowMetadata)
    for part in (handle.id, "✓ replay #1 order", "order replayed by dr.lee"):
        assert part in told.current_details
