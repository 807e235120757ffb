"""A service that is down: what waits for it, what goes on, and what a person's answer meanwhile is taken for."""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import Any

import pytest

from holdfast.authoring.agent import AgentSpec
from holdfast.authoring.services import BreakerRule, Service
from holdfast.authoring.tools import Tool, ToolContext, tool
from holdfast.contracts.people import DecisionReply
from holdfast.contracts.profile import Effect, StepSpec
from holdfast.contracts.run import Phase, RunOutcome, RunStatus
from holdfast.contracts.turn import OutcomeStatus
from holdfast.engine.client import STATUS
from holdfast.reliability.ledger import State
from holdfast.testing.model import Message, call, say, sequence, turn
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, cancelled, failure, status, until
from tests.fixtures.batch import Batch, Work, names
from tests.fixtures.world import World, agent


class Desk:
    """A service that sends a letter for each call, by what its `moods` say: one an attempt, then all is well."""

    def __init__(self, *moods: Any, probe_after_s: float = 1.5) -> None:
        self.name = f"desk-{uuid.uuid4().hex[:8]}"
        self.service = Service(self.name, breaker=BreakerRule(failures=1, probe_after_s=probe_after_s))
        self.moods = list(moods)
        self.tries = 0
        self.sent: list[str] = []

    def tool(self, effect: Effect = Effect.MANUAL, **declared: Any) -> Tool:
        @tool(effect=effect, service=self.name, **declared)
        async def send(ctx: ToolContext, n: int = 0) -> str:
            """Send a letter."""
            self.tries += 1
            if self.moods:
                mood = self.moods.pop(0)
                if isinstance(mood, Exception):
                    raise mood
                await mood()
            self.sent.append(ctx.key)
            return "sent"

        return send

    def agent(self, *tools: Tool, **more: Any) -> AgentSpec:
        return agent(*tools, services=(self.service,), **more)


DOWN = ConnectionRefusedError("down")
LOST = TimeoutError("the answer was lost")


def open_ones(now: RunStatus) -> list[str]:
    return [each.id for each in now.approvals]


# ------------------------------------------------------------ each answer holds for what was shown


async def test_a_call_that_is_unknown_after_its_wait_is_asked_anew_and_settled_once(lite: Stage) -> None:
    desk = Desk(DOWN, LOST)
    lite.model.script = sequence(call(("send", {})), say("sent, perhaps"), call(("send", {})), say("done"))
    async with lite.worker():
        handle = await lite.start(desk.agent(desk.tool()))
        first = await until(handle, lambda now: bool(now.approvals))
        assert [(each.id, each.about) for each in first.approvals] == [("o1", OutcomeStatus.DEFERRED)]
        second = await until(handle, lambda now: open_ones(now) == ["o1-2"])
        assert second.approvals[0].about == OutcomeStatus.UNKNOWN
        no = {"verdict": "did_not", "approver": "n.smith", "comment": "nothing in the outbox"}
        late = await handle.execute_update("decide", {"approval_id": "o1", **no}, result_type=DecisionReply)
        assert not late.accepted
        assert "the run withdrew the question o1, because call #1 of send was tried again" in late.message
        await handle.signal("decide", {"approval_id": "o1-2", **no})
        result = await handle.result()
        scheduled = [
            event.activity_task_scheduled_event_attributes.activity_type.name
            async for event in handle.fetch_history_events()
            if event.HasField("activity_task_scheduled_event_attributes")
        ]
    assert result.outcome is RunOutcome.COMPLETED
    assert scheduled.count("settle") == 1
    assert [key.rpartition("/")[2] for key in desk.sent] == ["2"]


async def test_an_answer_to_the_wait_is_not_taken_for_what_a_try_under_way_ends_with(lite: Stage) -> None:
    """The person has seen a call that is put off, while the platform tries it again; that try ends unknown."""
    begun, go = asyncio.Event(), asyncio.Event()

    async def lost() -> None:
        begun.set()
        await go.wait()
        raise LOST

    desk = Desk(DOWN, lost)
    lite.model.script = sequence(call(("send", {})), say("sent, perhaps"))
    async with lite.worker():
        handle = await lite.start(desk.agent(desk.tool()))
        await until(handle, lambda now: open_ones(now) == ["o1"])
        await begun.wait()
        no = {"verdict": "did_not", "approver": "n.smith", "comment": "I have not sent it"}
        reply = await handle.execute_update("decide", {"approval_id": "o1", **no}, result_type=DecisionReply)
        assert reply.accepted
        go.set()
        asked = await until(handle, lambda now: open_ones(now) == ["o1-2"])
        assert asked.approvals[0].about == OutcomeStatus.UNKNOWN
        assert any("n.smith answered o1 (did_not) while call #1 of send was tried again" in n for n in asked.notes)
        rows = await lite.runtime.ledger.entries(asked.key_base)
        assert [(each.key[-2:], each.state) for each in rows if each.kind == "tool"] == [("/1", State.UNKNOWN)]
        await handle.signal("decide", {"approval_id": "o1-2", "verdict": "happened", "approver": "n.smith"})
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert desk.sent == []


async def test_what_a_person_has_done_counts_for_a_put_off_call_that_never_went_out(lite: Stage) -> None:
    """The breaker was open before the call: the ledger has no row of it."""
    desk = Desk()
    await lite.runtime.guards.breaker.trip(desk.name, "moving house", "lee")
    letter = StepSpec(name="letter", tools=["send"], role="desk")
    lite.model.script = lambda m: say("done") if any(each["role"] == "tool" for each in m) else call(("send", {}))
    async with lite.worker():
        handle = await lite.start(desk.agent(desk.tool(deferrable=True), steps=[letter]))
        await until(handle, lambda now: now.phase is Phase.PARKED and bool(now.approvals))
        yes = {"approval_id": "o1", "verdict": "happened", "approver": "n.smith", "comment": "by hand"}
        await handle.signal("decide", yes)
        result = await handle.result()
        assert (await status(handle)).steps[0].origin == "settled by n.smith"
    assert result.outcome is RunOutcome.COMPLETED
    assert desk.tries == 0
    (row,) = [e for e in await lite.runtime.ledger.entries(result.key_base) if e.kind == "tool"]
    assert row.state is State.DONE


async def test_a_run_that_waited_for_a_service_and_then_needs_a_person_says_so(lite: Stage) -> None:
    """The agent has finished by then, so nothing but the person's answer can end the run."""
    desk = Desk(DOWN, LOST)
    letter = StepSpec(name="letter", tools=["send"], role="desk")
    lite.model.script = sequence(call(("send", {})), say("sent, perhaps"), say("done"))
    async with lite.worker():
        handle = await lite.start(desk.agent(desk.tool(), steps=[letter]))
        await until(handle, lambda now: now.phase is Phase.PARKED)
        asked = await until(handle, lambda now: open_ones(now) == ["o1-2"])
        assert asked.phase is Phase.WAITING_HUMAN
        assert (await handle.describe()).typed_search_attributes.get(STATUS) == Phase.WAITING_HUMAN
        await handle.signal("decide", {"approval_id": "o1-2", "verdict": "happened", "approver": "n.smith"})
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert result.human_wait_s > 0


# ------------------------------------------------------------ a breaker that is open before the call


def willing(stage: Stage, *wanted: str) -> Any:
    """A model that calls each of these tools once when it is offered, and else ends."""

    def script(messages: list[Message]) -> Message:
        made = {c["function"]["name"] for m in messages for c in m.get("tool_calls") or ()}
        now = [(name, {}) for name in wanted if name in stage.model.offered[-1] - made]
        return call(*now) if now else say("that is all I can do")

    return script


@pytest.mark.parametrize("critical", [True, False], ids=["critical", "optional"])
async def test_a_run_does_not_end_without_a_step_whose_tool_was_withdrawn(lite: Stage, critical: bool) -> None:
    desk = Desk()
    await lite.runtime.guards.breaker.trip(desk.name, "moving house", "lee")
    world = World()
    steps = [
        StepSpec(name="letter", tools=["send"], critical=critical, role="desk"),
        StepSpec(name="book", tools=["book"]),
    ]
    spec = desk.agent(desk.tool(), world.tool("book"), steps=steps)
    lite.model.script = willing(lite, "send", "book")
    async with lite.worker():
        handle = await lite.start(spec)
        parked = await until(handle, lambda now: now.phase is Phase.PARKED)
        assert "Trying again: send at " in parked.line
        assert f"{desk.name} may not be called: tripped by lee: moving house" in parked.line
        assert world.log == ["begin book#1", "done book#1"], "what does not need it went on, and nothing is undone"
        asked = len(lite.model.requests)
        again = desk_until(parked)
        await until(handle, lambda now: desk_until(now) not in (again, ""))
        assert len(lite.model.requests) == asked, "waiting asks no model"
        await lite.runtime.guards.breaker.reset(desk.name, "lee")
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert (len(desk.sent), desk.tries) == (1, 1)
    assert lite.model.offered[0] == {"book"}, "at first the tool is withdrawn"


def desk_until(now: RunStatus) -> str:
    """When the call of `send` is tried again, as the status says."""
    found = re.search(r"send at (\S+) UTC", now.line)
    return found[1] if found else ""


@pytest.mark.parametrize("critical", [True, False], ids=["critical", "optional"])
async def test_the_wait_ends_with_the_patience_of_the_tool(lite: Stage, critical: bool) -> None:
    desk = Desk()
    await lite.runtime.guards.breaker.trip(desk.name, "moving house", "lee")
    step = StepSpec(name="letter", tools=["send"], critical=critical, role="desk")
    lite.model.script = willing(lite, "send")
    async with lite.worker():
        handle = await lite.start(desk.agent(desk.tool(deadline=4), steps=[step]))
        if critical:
            result = await failure(handle)
            assert result.reason.startswith("critical step gone: letter: ")
            assert "moving house" in result.reason
        else:
            result = await handle.result()
            assert result.outcome is RunOutcome.PARTIAL
            assert [(each.step, each.role) for each in result.pending] == [("letter", "desk")]
    assert desk.tries == 0


async def test_a_model_that_will_not_call_what_it_is_offered_again_is_offered_it_once(lite: Stage) -> None:
    desk = Desk()
    await lite.runtime.guards.breaker.trip(desk.name, "moving house", "lee")
    step = StepSpec(name="letter", tools=["send"], critical=False, role="desk")
    lite.model.script = lambda messages: say("I do not write letters")
    async with lite.worker():
        result = await (await lite.start(desk.agent(desk.tool(), steps=[step]))).result()
    assert (result.outcome, result.turns) == (RunOutcome.PARTIAL, 2)


async def test_a_wait_for_a_withdrawn_tool_is_cancelled_at_once_and_undoes_what_was_done(lite: Stage) -> None:
    desk, world = Desk(), World()
    await lite.runtime.guards.breaker.trip(desk.name, "moving house", "lee")
    lite.model.script = willing(lite, "send", "book")
    async with lite.worker():
        handle = await lite.start(desk.agent(desk.tool(), world.tool("book")))
        await until(handle, lambda now: now.phase is Phase.PARKED)
        await handle.cancel()
        await cancelled(handle)
    assert world.log[-1] == "undo book#1"
    assert desk.tries == 0


async def test_a_wait_for_a_withdrawn_tool_goes_on_after_continue_as_new(lite: Stage) -> None:
    desk = Desk()
    await lite.runtime.guards.breaker.trip(desk.name, "moving house", "lee")
    lite.model.script = willing(lite, "send")
    async with lite.worker():
        handle = await lite.start(desk.agent(desk.tool(), turns_per_execution=1))
        await until(handle, lambda now: now.phase is Phase.PARKED)
        async with asyncio.timeout(PATIENCE_S):
            while (await handle.describe()).run_id == handle.first_execution_run_id:
                await asyncio.sleep(0.05)
        await until(handle, lambda now: now.phase is Phase.PARKED and "Trying again: send" in now.line)
        await lite.runtime.guards.breaker.reset(desk.name, "lee")
        result = await handle.result()
    assert (result.outcome, len(desk.sent)) == (RunOutcome.COMPLETED, 1)


async def test_a_tool_that_the_rest_of_the_work_needs_is_not_withdrawn(
    lite: Stage,
) -> None:
    desk, world = Desk(), World()
    await lite.runtime.guards.breaker.trip(desk.name, "moving house", "lee")
    lite.model.script = lambda m: (
        call(("send", {})) if turn(m) == 1 else call(("tell", {})) if turn(m) == 2 else say("told")
    )
    async with lite.worker():
        handle = await lite.start(
            desk.agent(desk.tool(Effect.READ, deferrable=False), world.tool("tell", approval=True))
        )
        parked = await until(handle, lambda now: now.phase is Phase.PARKED)
        assert re.search(rf"Parked: {desk.name} may not be called: .*; tried again at [\d:]+ UTC", parked.line)
        assert (parked.turn, parked.approvals) == (1, [])
        await lite.runtime.guards.breaker.reset(desk.name, "lee")
        await until(handle, lambda now: open_ones(now) == ["a2"])
        await handle.signal("decide", {"approval_id": "a2", "verdict": "approve", "approver": "dr.lee"})
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
    assert "send" in lite.model.offered[0]


async def test_a_run_of_a_batch_that_waits_for_a_withdrawn_tool_gives_its_place(lite: Stage) -> None:
    """A window of one: the second run begins only because the first stands still."""
    desk = Desk()
    await lite.runtime.guards.breaker.trip(desk.name, "moving house", "lee")
    batch = Batch.of(desk.agent(desk.tool(), input=Work), window=1, most_open=2)
    lite.model.script = willing(lite, "send")
    async with lite.worker():
        handle = await batch.start(lite, names(2))
        await until(handle, lambda now: now.items is not None and now.items.parked == 2)
        await lite.runtime.guards.breaker.reset(desk.name, "lee")
        result = await handle.result()
    assert (result.outcome, len(desk.sent)) == (RunOutcome.COMPLETED, 2)
