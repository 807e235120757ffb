"""What a run tells the outside: signed, under one id however often it is sent, and never in the run's way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio
from langgraph.graph import START, StateGraph
from langgraph.types import interrupt
from pydantic import SecretStr
from standardwebhooks import WebhookVerificationError
from starlette.responses import Response
from temporalio.client import WorkflowExecutionStatus

import activities.webhooks
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ToolFailed
from holdfast.contracts.profile import StepSpec
from holdfast.contracts.recovery import Action, Repair
from holdfast.contracts.run import AgentInput, RunOutcome, RunResult
from holdfast.contracts.webhooks import Hook
from holdfast.engine.starting import TASK_TIMEOUT
from holdfast.engine.webhooks import AMENDED, run_is
from holdfast.reasoning.graph import Turn, TurnState, final
from holdfast.recovery.dead_letters import DeadLetter, DeadLetters, LetterKind, LetterState
from holdfast.recovery.model import unwind_id
from holdfast.recovery.orphans import find_orphans
from holdfast.recovery.requests import send_again, start_repair
from holdfast.reliability import crash_points
from holdfast.reliability.ledger import Ledger
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, cancelled, failure, until
from tests.fixtures.receiver import SECRET, Receiver
from tests.fixtures.wire import free_port
from tests.fixtures.world import World, agent
from workflows.agent import AgentWorkflow

NEXT_SECRET = "whsec_dGhlIG5leHQgc2VjcmV0LCB3aGljaCByZXBsYWNlcyBpdA=="


def configured(stage: Stage, **settings: Any) -> Stage:
    """The same stage with workers that sign."""
    update = {"webhook_secret": SecretStr(SECRET), **settings}
    stage.runtime = replace(stage.runtime, settings=stage.runtime.settings.model_copy(update=update))
    return stage


@pytest.fixture
def signing(lite: Stage) -> Stage:
    return configured(lite)


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver.serve() as one:
        yield one


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who does not answer is asked twice, so the breaker of the address stays closed too."""
    monkeypatch.setattr(activities.webhooks, "RETRIES", 0)


def booking(stage: Stage, *tools: Any, **more: Any) -> Any:
    world = World()
    stage.model.script = sequence(call(("book", {"n": 1})), say("done"))
    return agent(world.tool("book"), *tools, **more)


async def letter(stage: Stage) -> DeadLetter:
    """The only webhook that nobody took."""
    letters = DeadLetters(stage.runtime.db)
    async with asyncio.timeout(PATIENCE_S):
        while not (found := await letters.find(kind=LetterKind.HOOK, state=LetterState.OPEN)):
            await asyncio.sleep(0.02)
    (only,) = found
    return only


async def test_the_end_of_a_run_is_told_signed_and_without_what_it_worked_on(
    signing: Stage, receiver: Receiver
) -> None:
    async with signing.worker():
        handle = await signing.start(
            booking(signing), {"what": "SECRET-INPUT"}, webhook=receiver.url, request_key="k-1"
        )
        await handle.result()
        await receiver.has(1)
    (event,) = receiver.events()
    data = event["data"]
    assert event["type"] == "run.ended"
    assert datetime.now(UTC).timestamp() - datetime.fromisoformat(event["timestamp"]).timestamp() < 30
    assert (data["workflow_id"], data["request_key"]) == (handle.id, "k-1")
    assert (data["outcome"], data["percent"], data["pending"]) == ("completed", 100, [])
    assert data["url"].endswith(f"/namespaces/default/workflows/{handle.id}")
    assert "SECRET-INPUT" not in str(event)
    with pytest.raises(WebhookVerificationError):
        receiver.events(NEXT_SECRET)


async def test_while_one_secret_replaces_another_either_verifies(lite: Stage, receiver: Receiver) -> None:
    stage = configured(lite, webhook_secret=SecretStr(f"{SECRET} {NEXT_SECRET}"))
    async with stage.worker():
        await (await stage.start(booking(stage), webhook=receiver.url)).result()
        await receiver.has(1)
    assert receiver.events(SECRET) == receiver.events(NEXT_SECRET)


async def test_every_try_has_the_same_id_and_a_time_of_its_own(signing: Stage, receiver: Receiver) -> None:
    receiver.answers = [503, Response(status_code=429, headers={"retry-after": "1"})]
    async with signing.worker():
        await (await signing.start(booking(signing), webhook=receiver.url)).result()
        await receiver.has(3)
    assert len(set(receiver.ids)) == 1
    first, _, third = (int(headers["webhook-timestamp"]) for headers, _ in receiver.requests)
    assert third > first
    assert len({body for _, body in receiver.requests}) == 1


async def test_a_worker_that_dies_before_recording_sends_again_under_the_same_id(
    signing: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Stands for the death of the process."""

    died: list[int] = []

    def strike(*_: Any) -> None:
        died.append(1)
        raise Killed

    monkeypatch.setattr(crash_points, "strike", strike)
    monkeypatch.setattr(crash_points, "_armed", None)
    crash_points.arm("kill:effect-done@run.ended")
    async with signing.worker():
        handle = await signing.start(booking(signing), webhook=receiver.url)
        result = await handle.result()
        await receiver.has(2)
        await delivery_of(signing, result.key_base)
    assert died
    assert len(receiver.ids) == 2
    assert len(set(receiver.ids)) == 1


async def delivery_of(stage: Stage, key_base: str) -> Any:
    """Waits for the deliveries of a run."""
    for entry in await Ledger(stage.runtime.db, "").entries(key_base):
        if entry.kind == "hook":
            await stage.client.get_workflow_handle(entry.key.replace("/", "-")).result()


async def test_a_run_ends_while_its_receiver_hangs_and_is_not_seen_as_running(
    signing: Stage, receiver: Receiver
) -> None:
    receiver.hangs = asyncio.Event()
    async with signing.worker():
        handle = await signing.start(booking(signing), webhook=receiver.url)
        await handle.result()
        await receiver.has(1)
        assert (await handle.describe()).status is WorkflowExecutionStatus.COMPLETED
        delivery = signing.client.get_workflow_handle(await hanging(signing))
        assert (await delivery.describe()).status is WorkflowExecutionStatus.RUNNING
        receiver.hangs.set()
        assert (await delivery.result())["ok"]
    assert len(receiver.requests) == 1


async def hanging(stage: Stage) -> str:
    (key,) = [row[0] for row in await stage.runtime.db.all("SELECT key FROM effects WHERE kind = 'hook'")]
    return key.replace("/", "-")


async def test_what_nobody_took_is_a_dead_letter_and_is_delivered_later_under_its_id(
    signing: Stage, impatient: None
) -> None:
    port = free_port()
    async with signing.worker():
        handle = await signing.start(booking(signing), webhook=f"http://127.0.0.1:{port}/hook")
        await handle.result()
        dead = await letter(signing)
        hook = Hook.model_validate(dead.details["arguments"])
        assert dead.workflow_id == handle.id
        assert dead.subject == "run.ended"
        assert len(dead.details["attempts"]) == 1
        assert "ConnectError" in dead.cause
        await signing.client.get_workflow_handle(hook.delivery_id).result()
        # Once more in vain: the letter is open again.
        again = await send_again(signing.client, signing.runtime.db, dead, "kim", signing.queue)
        assert not (await again.result()).ok
        assert (await letter(signing)).id == dead.id
        async with Receiver.serve(port) as receiver:
            again = await send_again(signing.client, signing.runtime.db, await letter(signing), "kim", signing.queue)
            assert (await again.result()).ok
    assert receiver.ids == [hook.id]
    closed = await DeadLetters(signing.runtime.db).get(dead.id)
    assert closed is not None
    assert closed.state == LetterState.REPLAYED


@pytest.mark.parametrize("status", [400, 401, 410, 302])
async def test_an_answer_that_says_no_is_final(signing: Stage, receiver: Receiver, status: int) -> None:
    receiver.answers = [Response(status_code=status, headers={"location": receiver.url})]
    async with signing.worker():
        await (await signing.start(booking(signing), webhook=receiver.url)).result()
        dead = await letter(signing)
    assert f"answered {status}" in dead.cause
    assert len(receiver.requests) == 1


async def test_without_a_secret_nothing_is_sent_and_the_letter_says_why(lite: Stage, receiver: Receiver) -> None:
    async with lite.worker():
        await (await lite.start(booking(lite), webhook=receiver.url)).result()
        dead = await letter(lite)
    assert "HOLDFAST_WEBHOOK_SECRET" in dead.cause
    assert receiver.requests == []


async def test_an_address_outside_the_list_is_not_called_even_past_the_door(lite: Stage, receiver: Receiver) -> None:
    stage = configured(lite, webhook_hosts="*.example.com")
    async with stage.worker():
        await (await stage.start(booking(stage), webhook=receiver.url)).result()
        dead = await letter(stage)
    assert "HOLDFAST_WEBHOOK_HOSTS" in dead.cause
    assert receiver.requests == []


async def test_needed_input_is_told_before_it_is_given_and_without_the_arguments(
    signing: Stage, receiver: Receiver
) -> None:
    world = World()
    spec = agent(world.tool("send", approval=True))
    signing.model.script = sequence(call(("send", {"n": 4711})), say("done"))
    async with signing.worker():
        handle = await signing.start(spec, webhook=receiver.url)
        await receiver.has(1)
        (event,) = receiver.events()
        data = event["data"]
        assert event["type"] == "run.needs_input"
        assert (data["id"], data["kind"], data["subject"]) == ("a1", "tool", "send")
        assert data["answer"][0] == f"uv run starter.py approve {handle.id} a1"
        assert "4711" not in str(event)
        await handle.signal("decide", {"approval_id": "a1", "verdict": "approve", "approver": "dr.lee"})
        await handle.result()
        await receiver.has(2)
    assert [each["type"] for each in receiver.events()] == ["run.needs_input", "run.ended"]
    assert len(set(receiver.ids)) == 2


async def test_what_a_question_shows_a_person_does_not_leave_the_house(signing: Stage, receiver: Receiver) -> None:
    def ask(state: TurnState) -> Json:
        return {"decision": final(interrupt({"mail": "SECRET", "role": "front desk"}))}

    graph = StateGraph(TurnState, context_schema=Turn)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask")
    async with signing.worker():
        handle = await signing.start(agent(graph=graph), webhook=receiver.url)
        await receiver.has(1)
        (approval,) = (await until(handle, lambda s: bool(s.approvals))).approvals
        await handle.signal("decide", {"approval_id": "q1", "verdict": "answer", "approver": "kim", "answer": "yes"})
        await handle.result()
    (asked, *_) = receiver.events()
    assert (asked["data"]["why"], asked["data"]["role"]) == ("An answer is needed: mail, role", "front desk")
    assert b"SECRET" not in receiver.requests[0][1]
    assert approval.arguments == {"mail": "SECRET", "role": "front desk"}


async def test_a_run_with_the_longest_id_that_there_is_tells_its_end(signing: Stage, receiver: Receiver) -> None:
    spec = booking(signing)
    async with signing.worker():
        handle = await signing.client.start_workflow(
            AgentWorkflow.run,
            AgentInput(agent=spec.name, webhook=receiver.url),
            id=spec.name.ljust(1000, "x"),
            task_queue=signing.queue,
            task_timeout=TASK_TIMEOUT,
        )
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
        await receiver.has(1)
    assert receiver.events()[0]["data"]["workflow_id"] == handle.id


async def test_no_address_is_sent_what_an_earlier_answer_wanted_remembered(lite: Stage, receiver: Receiver) -> None:
    receiver.answers = [Response(headers={"set-cookie": "session=of-another-tenant; Path=/"})]
    for _ in range(2):
        await lite.runtime.http.post(receiver.url)
    assert [headers.get("cookie") for headers, _ in receiver.requests] == [None, None]


async def test_a_question_is_told_although_the_run_continues_as_new_at_once(signing: Stage, receiver: Receiver) -> None:
    world = World()
    spec = agent(world.tool("send", approval=True), turns_per_execution=1)
    signing.model.script = sequence(call(("send", {})), say("done"))
    async with signing.worker():
        handle = await signing.start(spec, webhook=receiver.url)
        await receiver.has(1)
        async with asyncio.timeout(PATIENCE_S):
            while (await handle.describe()).run_id == handle.first_execution_run_id:
                await asyncio.sleep(0.02)
        await handle.signal("decide", {"approval_id": "a1", "verdict": "approve", "approver": "dr.lee"})
        await signing.client.get_workflow_handle(handle.id).result()
        await receiver.has(2)
    assert [each["type"] for each in receiver.events()] == ["run.needs_input", "run.ended"]


async def test_failed_and_cancelled_runs_tell_it_too(signing: Stage, receiver: Receiver) -> None:
    world = World()
    fails = agent(world.tool("book", errors=[ToolFailed("no rooms")]))
    waits = agent(world.tool("send", approval=True))
    async with signing.worker():
        signing.model.script = sequence(call(("book", {})))
        await failure(await signing.start(fails, webhook=receiver.url))
        await receiver.has(1)
        signing.model.script = sequence(call(("send", {})))
        handle = await signing.start(waits, webhook=receiver.url)
        await receiver.has(2)
        await handle.cancel()
        await cancelled(handle)
        await receiver.has(3)
    told = [(each["type"], each["data"].get("outcome")) for each in receiver.events()]
    assert told == [("run.ended", "failed"), ("run.needs_input", None), ("run.ended", "cancelled")]


async def test_what_is_settled_after_the_end_is_told(signing: Stage, receiver: Receiver) -> None:
    world = World()
    steps = [StepSpec(name="pharmacy", tools=["order"], critical=False, role="pharmacist")]
    spec = agent(world.tool("order", errors=[ToolFailed("out of stock")]), steps=steps)
    signing.model.script = sequence(call(("order", {})), say("all but the pharmacy"))
    async with signing.worker():
        handle = await signing.start(spec, webhook=receiver.url)
        result = await handle.result()
        (pending,) = result.pending
        action = Action(do="settle", key=pending.key, tool="order", step="pharmacy", happened=True)
        repair = Repair(
            workflow_id=handle.id, key_base=result.key_base, agent=spec.name, by="kim", letter="x", actions=[action]
        )
        await (await start_repair(signing.client, repair, signing.queue)).result()
        await receiver.has(3)
    told = {each["type"]: each["data"] for each in receiver.events()}
    assert told["run.ended"]["outcome"] == "partial"
    assert told["run.ended"]["pending"] == [{"step": "pharmacy", "role": "pharmacist"}]
    assert (told["run.amended"]["outcome"], told["run.amended"]["pending"]) == ("completed", [])


def test_two_amendments_within_a_second_are_two_events() -> None:
    result = RunResult(outcome=RunOutcome.PARTIAL, key_base="wf/run", webhook="http://localhost")
    at = datetime(2026, 11, 21, 12, 0, 0, 100_000, UTC)
    first, second = (
        run_is(AMENDED, result, "wf", "", "default", each) for each in (at, at.replace(microsecond=200_000))
    )
    assert first.delivery_id != second.delivery_id
    assert first.id != second.id


async def test_a_run_that_was_terminated_is_told_of_when_it_is_found(signing: Stage, receiver: Receiver) -> None:
    world = World()
    spec = agent(world.tool("book"), world.tool("send", approval=True))
    signing.model.script = sequence(call(("book", {"n": 1})), call(("send", {})))
    async with signing.worker():
        handle = await signing.start(spec, webhook=receiver.url)
        await receiver.has(1)
        await handle.terminate()
        (found,) = await find_orphans(signing.runtime.db, signing.client, 0.0)
        await signing.client.execute_workflow(
            "RepairWorkflow", found, id=unwind_id(found.key_base), task_queue=signing.queue, task_timeout=TASK_TIMEOUT
        )
        await receiver.has(2)
    assert [each["data"].get("outcome") for each in receiver.events()] == [None, "cancelled"]
