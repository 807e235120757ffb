"""A turn is idempotent: cut off anywhere and tried again it ends the same, and no recorded model call is paid twice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from temporalio.exceptions import ApplicationError

from activities.plan import Plan
from holdfast.contracts.turn import PlanRequest, PlanResult
from holdfast.reliability import crash_points
from holdfast.reliability.crash_points import Point
from holdfast.reliability.ledger import State
from holdfast.state.database import StoreUnavailable
from holdfast.testing.model import Message, call, error, say, sequence, turn
from tests.fixtures.world import World, agent
from tests.integration.activities.conftest import Killed, Process


@pytest.fixture
def first() -> PlanRequest:
    """The first turn of a run whose model calls `book`, then ends."""
    return PlanRequest(agent=agent(World().tool("book")).name, key_base="wf/run", turn=1, input={"what": "y"})


@pytest.fixture
def plan(process: Process) -> Any:
    process.model.script = sequence(call(("book", {"n": 1})), call(("book", {"n": 2})), say("done"))
    return Plan(process.runtime).plan


def next_turn(before: PlanRequest, result: PlanResult, text: str = "booked") -> PlanRequest:
    """The turn after, which hears the answer to every call."""
    answers = [text for _ in result.calls]
    return before.model_copy(
        update={"turn": before.turn + 1, "base": result.checkpoint, "answers": answers, "input": None}
    )


def roles(messages: list[Message]) -> str:
    """The conversation as one letter a message: s(ystem), u(ser), a(ssistant), t(ool)."""
    return "".join(m["role"][0] for m in messages)


async def test_turns_carry_the_conversation_on(process: Process, plan: Any, first: PlanRequest) -> None:
    one = await process.run(plan, first)
    second = next_turn(first, one)
    two = await process.run(plan, second)
    three = await process.run(plan, next_turn(second, two))
    assert [c.arguments for c in one.calls + two.calls] == [{"n": 1}, {"n": 2}]
    assert three.final == "done"
    assert [roles(m) for _, m in process.model.requests] == ["su", "suat", "suatat"]
    assert process.model.requests[0][0].startswith("wf/run/turn-1.")
    assert one.profile is not None
    assert two.profile is None
    assert (one.usage.calls, two.usage.calls, one.model) == (1, 1, "fake-1")


async def test_a_finished_turn_returns_its_recorded_decision(process: Process, plan: Any, first: PlanRequest) -> None:
    result = await process.run(plan, first)
    assert await process.run(plan, first) == result
    assert len(process.model.requests) == 1


async def test_a_turn_whose_past_the_store_has_forgotten_waits_for_it_and_asks_no_model(
    process: Process, plan: Any, first: PlanRequest
) -> None:
    """A store that was restored older than Temporal: a run that began anew would do everything again."""
    second = next_turn(first, await process.run(plan, first))
    kept = await process.runtime.db.all("SELECT * FROM checkpoints")
    await process.runtime.db.run("DELETE FROM checkpoints")
    with pytest.raises(ApplicationError, match="restored older than Temporal") as caught:
        await process.run(plan, second)
    assert (caught.value.type, caught.value.non_retryable) == ("forgotten", False)
    assert len(process.model.requests) == 1
    for row in kept:
        await process.runtime.db.run(f"INSERT INTO checkpoints VALUES ({', '.join('?' * len(row))})", *row)
    assert [each.arguments for each in (await process.run(plan, second)).calls] == [{"n": 2}]


@pytest.mark.parametrize(
    ("point", "calls"),
    [
        (Point.TURN_STARTED, 1),
        (Point.MODEL_RESERVED, 1),
        (Point.MODEL_ANSWERED, 2),
        (Point.MODEL_RECORDED, 1),
        (Point.NODE_DONE, 1),
        (Point.DECIDED, 1),
    ],
)
@pytest.mark.parametrize("at_turn", [1, 2])
async def test_after_a_crash_it_goes_on_where_it_was(
    process: Process, plan: Any, first: PlanRequest, point: Point, calls: int, at_turn: int
) -> None:
    """Only the answer that was never recorded is asked for again; no message is doubled."""
    request = first
    if at_turn == 2:
        request = next_turn(first, await process.run(plan, first))
    paid = len(process.model.requests)
    await process.dies(point, plan, request)
    result = await process.run(plan, request)
    assert len(process.model.requests) - paid == calls
    assert [c.arguments for c in result.calls] == [{"n": at_turn}]
    assert result.usage.calls == 1
    await process.run(plan, next_turn(request, result))
    assert roles(process.model.requests[-1][1]) == "su" + "at" * at_turn


async def test_a_crash_between_the_re_asks_repeats_none_of_them(
    process: Process, plan: Any, first: PlanRequest
) -> None:
    script = sequence(call(("nope", {})), call(("book", {"n": "x"})), call(("book", {"n": 1})))

    def deadly(messages: list[Message]) -> Any:
        crash_points.arm(f"kill:{Point.MODEL_RECORDED}")
        return script(messages)

    process.model.script = deadly
    for _ in range(3):
        with pytest.raises(Killed):
            await process.run(plan, first)
    result = await process.run(plan, first)
    assert [roles(m) for _, m in process.model.requests] == ["su", "suat", "suatat"]
    assert len({key for key, _ in process.model.requests}) == 3
    assert (result.usage.calls, result.calls[0].arguments) == (3, {"n": 1})


async def test_a_turn_stores_one_checkpoint(process: Process, plan: Any, first: PlanRequest) -> None:
    one = await process.run(plan, first)
    two = await process.run(plan, next_turn(first, one))
    stored = await process.runtime.db.all("SELECT checkpoint_id, parent_id FROM checkpoints ORDER BY checkpoint_id")
    assert [(row[0], row[1] or "") for row in stored] == [(one.checkpoint, ""), (two.checkpoint, one.checkpoint)]
    assert await process.runtime.db.all("SELECT 1 FROM checkpoint_writes") == []


async def test_a_turn_without_an_answer_leaves_no_checkpoint(process: Process, plan: Any, first: PlanRequest) -> None:
    """Its next attempt begins anew: by then other tools may be withdrawn."""
    script, process.model.script = process.model.script, lambda messages: error(400, "content_policy_violation")
    assert (await process.run(plan, first)).refusal
    assert await process.runtime.db.all("SELECT 1 FROM checkpoints") == []
    process.model.script = script
    again = first.model_copy(update={"notices": ["ask again"]})
    assert (await process.run(plan, again)).calls


async def test_a_decision_that_the_store_does_not_take_is_not_reported(
    process: Process, plan: Any, first: PlanRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def down(*_: Any) -> int:
        raise StoreUnavailable("for the test")

    with monkeypatch.context() as patch, pytest.raises(ApplicationError, match="for the test"):
        patch.setattr(process.runtime.db, "run", down)
        await process.run(plan, first)
    assert (await process.run(plan, first)).calls
    assert len(process.model.requests) == 1


async def test_of_two_attempts_at_once_the_first_answer_kept_is_the_decision_of_both(
    process: Process, plan: Any, first: PlanRequest
) -> None:
    """The first attempt was given up by the server and still waits for its model when the second one runs."""
    asked, go = asyncio.Event(), asyncio.Event()
    (model,) = process.runtime.models
    complete = model.complete

    async def slow(*arguments: Any, **more: Any) -> Any:
        answer = await complete(*arguments, **more)
        asked.set()
        await go.wait()
        return answer

    process.model.script = lambda messages: call(("book", {"n": len(process.model.requests)}))
    model.complete = slow
    zombie = asyncio.ensure_future(process.run(plan, first))
    await asked.wait()
    model.complete = complete
    result = await process.run(plan, first)
    go.set()
    late = await zombie
    assert [c.arguments for c in result.calls] == [c.arguments for c in late.calls] == [{"n": 2}]
    (row,) = await process.runtime.ledger.entries("wf/run")
    assert (row.kind, row.state) == ("model", State.DONE)
    assert (await process.run(plan, first)).calls == result.calls
    await process.run(plan, next_turn(first, result))
    assert roles(process.model.requests[-1][1]) == "suat"


async def test_a_turn_goes_on_from_its_base_and_not_from_the_head_of_the_thread(
    process: Process, plan: Any, first: PlanRequest
) -> None:
    """After a Reset a turn may be taken again from another past; what it left behind is nobody's base."""
    one = await process.run(plan, first)
    booked, failed = next_turn(first, one, "booked"), next_turn(first, one, "failed")
    two = await process.run(plan, booked)
    await process.run(plan, failed)
    await process.run(plan, next_turn(booked, two))
    heard = [m["content"] for m in process.model.requests[-1][1] if m["role"] == "tool"]
    assert heard == ["booked", "booked"]
    assert await process.run(plan, booked) == two


async def test_an_unfinished_turn_resumes_also_when_it_is_no_longer_the_head(
    process: Process, plan: Any, first: PlanRequest
) -> None:
    one = await process.run(plan, first)
    booked, failed = next_turn(first, one, "booked"), next_turn(first, one, "failed")
    await process.dies(Point.NODE_DONE, plan, booked)
    await process.run(plan, failed)
    paid = len(process.model.requests)
    two = await process.run(plan, booked)
    assert len(process.model.requests) == paid
    await process.run(plan, next_turn(booked, two))
    heard = [m["content"] for m in process.model.requests[-1][1] if m["role"] == "tool"]
    assert heard == ["booked", "booked"]


async def test_runs_do_not_hear_each_other(process: Process, plan: Any, first: PlanRequest) -> None:
    other = first.model_copy(update={"key_base": "wf/another", "input": {"what": "z"}})
    results = await asyncio.gather(process.run(plan, first), process.run(plan, other))
    assert results[0].checkpoint != results[1].checkpoint
    assert sorted(turn(m) for _, m in process.model.requests) == [1, 1]
    assert {m[1]["content"] for _, m in process.model.requests} == {'{"what": "y"}', '{"what": "z"}'}
