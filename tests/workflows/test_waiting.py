"""A service that is down: what waits for it, what goes on, and what a person's answer meanwhile is taken for."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from holdfast.agent import AgentSpec
from holdfast.contracts import DecisionReply, Effect, OutcomeStatus, Phase, RunOutcome, RunStatus, StepSpec
from holdfast.reliability.ledger import State
from holdfast.services import BreakerRule, Service
from holdfast.tools import Tool, ToolContext, tool
from tests.fixtures.model import call, say, sequence
from tests.fixtures.temporal import Stage, status, until
from tests.fixtures.world import agent


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
                if isinstance(mood, asyncio.Event):
                    await mood.wait()
                elif callable(mood):
                    await mood()
                else:
                    raise mood
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


async def test_a_call_that_is_unknown_after_its_wait_is_another_question_and_is_settled_once(lite: Stage) -> None:
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


async def test_what_a_person_has_done_while_the_call_was_put_off_counts_though_it_never_went_out(lite: Stage) -> None:
    """The breaker was open before the call: the ledger has no row of it."""
    desk = Desk()
    await lite.runtime.guards.breaker.trip(desk.name, "moving house", "lee")
    letter = StepSpec(name="letter", tools=["send"], role="desk")
    lite.model.script = lambda m: say("done") if any(each["role"] == "tool" for each in m) else call(("send", {}))
    async with lite.worker():
        handle = await lite.start(desk.agent(desk.tool(put_off=True), steps=[letter]))
        await until(handle, lambda now: now.phase is Phase.WAITING_HUMAN)
        yes = {"approval_id": "o1", "verdict": "happened", "approver": "n.smith", "comment": "by hand"}
        await handle.signal("decide", yes)
        result = await handle.result()
        assert (await status(handle)).steps[0].origin == "settled by n.smith"
    assert result.outcome is RunOutcome.COMPLETED
    assert desk.tries == 0
    (row,) = [e for e in await lite.runtime.ledger.entries(result.key_base) if e.kind == "tool"]
    assert row.state is State.DONE
