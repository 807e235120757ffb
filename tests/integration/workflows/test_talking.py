"""People who talk to a run: messages between its turns, and calls that run with arguments they have changed."""

from __future__ import annotations

import asyncio
import operator
from typing import Annotated, Any

import pytest
from langgraph.graph import START, StateGraph
from langgraph.types import interrupt
from temporalio.client import WorkflowHandle

from holdfast.authoring.agent import AgentSpec, StepSpec
from holdfast.authoring.tools import ToolContext, tool
from holdfast.contracts.data import Json
from holdfast.contracts.people import DecisionReply
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import Phase, RunOutcome
from holdfast.reasoning.graph import Turn, TurnState, final
from holdfast.reliability import ledger
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, at_rest, until
from tests.fixtures.temporal import temporal_cli
from tests.fixtures.world import World, agent

HELLO: Json = {"text": "the family arrives at noon", "by": "nurse.kim"}
EDIT: Json = {"approval_id": "a1", "verdict": "edit", "approver": "dr.lee", "arguments": {"n": 7}}
YES: Json = {"approval_id": "a1", "verdict": "approve", "approver": "dr.lee"}


def told(stage: Stage) -> list[Json]:
    """What the model has read in its last request."""
    return stage.model.requests[-1][1]


async def update(handle: WorkflowHandle[Any, Any], name: str, payload: Any) -> DecisionReply:
    return await handle.execute_update(name, payload, result_type=DecisionReply)


# ------------------------------------------------------------------ edit


async def test_a_call_runs_with_the_edited_arguments_and_the_model_is_told(stage: Stage) -> None:
    world = World()
    seen: list[Json] = []

    @tool(effect=Effect.IDEMPOTENT, service="world", approval=True)
    async def pay(ctx: ToolContext, n: int, to: str = "bank") -> str:
        """Pay."""
        seen.append({"n": n, "to": to})
        return "paid"

    @pay.undo
    async def refund(ctx: ToolContext, undo: Any) -> str:
        seen.append({"undo": dict(undo.arguments)})
        return "refunded"

    spec = agent(pay, world.tool("fail", Effect.READ, errors=[ValueError("gone")] * 9, retries=0))
    stage.model.script = sequence(call(("pay", {"n": 1})), call(("fail", {})), say("ended"))
    async with stage.worker():
        handle = await stage.start(spec)
        await until(handle, lambda s: len(s.approvals) == 1)
        reply = await update(handle, "decide", EDIT)
        assert reply.accepted
        with pytest.raises(Exception, match="failed"):
            await handle.result()
        result = await stage.stored(handle)
    assert seen == [{"n": 7, "to": "bank"}, {"undo": {"n": 7, "to": "bank"}}]
    answer = next(m["content"] for m in told(stage) if m["role"] == "tool")
    assert answer.startswith('[dr.lee changed the arguments to {"n": 7, "to": "bank"}]\n')
    assert answer.endswith("paid")
    decided = result.decisions[0]
    assert (decided.approval.arguments, decided.decision.arguments) == ({"n": 1, "to": "bank"}, {"n": 7})
    entry = await stage.runtime.ledger.entry(f"{result.key_base}/1")
    assert entry is not None
    assert (entry.state, entry.arguments) == (ledger.State.COMPENSATED, {"n": 7, "to": "bank"})


async def test_an_edit_that_the_tool_does_not_take_asks_again_and_says_why(lite: Stage) -> None:
    world = World()
    lite.model.script = sequence(call(("send", {"n": 1})), say("ended"))
    async with lite.worker():
        handle = await lite.start(agent(world.tool("send", approval=True)))
        await until(handle, lambda s: len(s.approvals) == 1)
        await handle.signal("decide", {**EDIT, "arguments": {"n": "many", "x": 1}})
        again = await until(handle, lambda s: [a.id for a in s.approvals] == ["a1-2"])
        (approval,) = again.approvals
        assert approval.arguments == {"n": 1}
        assert "n: Input should be a valid integer" in approval.why
        assert "edit of dr.lee ignored: n: Input should be" in again.notes[-1]
        late = await update(handle, "decide", EDIT)
        assert (late.accepted, "a1 was already approved with other arguments" in late.message) == (False, True)
        assert world.log == []
        await handle.signal("decide", {**EDIT, "approval_id": "a1-2"})
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
    assert world.log == ["begin send#1", "done send#1"]


@pytest.mark.parametrize("options", [{}, {"max_cached_workflows": 0}], ids=["cached", "uncached"])
async def test_edits_and_messages_survive_continue_as_new(lite: Stage, options: Json) -> None:
    world = World()
    spec = agent(world.tool("send", approval=True), turns_per_execution=1)
    lite.model.script = sequence(call(("send", {"n": 1}), ("send", {"n": 2})), say("ended"))
    async with lite.worker(**options):
        handle = await lite.start(spec)
        await until(handle, lambda s: len(s.approvals) == 2)
        for payload in ({**EDIT, "arguments": {"n": "many"}}, {**EDIT, "approval_id": "a2"}):
            await handle.signal("message", HELLO)
            await handle.signal("decide", payload)
        await until(handle, lambda s: [a.id for a in s.approvals] == ["a1-2"])
        await handle.signal("decide", {**EDIT, "approval_id": "a1-2"})
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert sorted(world.log) == ["begin send#1", "begin send#2", "done send#1", "done send#2"]
    heard = [str(m.get("content")) for m in told(lite)]
    assert heard.count("Message from nurse.kim: the family arrives at noon") == 2
    assert sum('changed the arguments to {"n": 7}' in each for each in heard) == 2


# ------------------------------------------------------------------ answer


def asking(*nodes: Any, **more: Any) -> AgentSpec:
    """An agent whose graph runs these nodes side by side, then says what they have logged."""
    graph = StateGraph(State, context_schema=Turn)
    graph.add_node("end", lambda state: {"decision": final(", ".join(sorted(state["log"])))})
    for node in nodes:
        graph.add_node(node.__name__, node)
        graph.add_edge(START, node.__name__)
        graph.add_edge(node.__name__, "end")
    return agent(graph=graph, **more)


class State(TurnState):
    log: Annotated[list[str], operator.add]


def desk(state: State) -> Json:
    if state["log"]:  # a turn that only has to hear something
        return {}
    return {"log": [f"desk {interrupt({'question': 'Which desk?', 'role': 'clerk'})}"]}


def urgent(state: State) -> Json:
    if state["log"]:
        return {}
    return {"log": [f"urgent {interrupt('Is it urgent?')}"]}


async def test_two_branches_ask_people_and_the_turn_goes_on_with_both_answers(lite: Stage) -> None:
    async with lite.worker():
        handle = await lite.start(asking(desk, urgent))
        opened = {a.why: a for a in (await until(handle, lambda s: len(s.approvals) == 2)).approvals}
        first, second = opened["Which desk?"], opened["Is it urgent?"]
        assert {first.id, second.id} == {"q1", "q1-2"}
        assert (first.kind, first.role, second.role) == ("question", "clerk", "")
        assert (await handle.describe()).raw_description.pending_activities == []  # nothing is held in a worker
        wrong = await update(handle, "decide", {**YES, "approval_id": first.id})
        assert (wrong.accepted, "answered with answer, not approve" in wrong.message) == (False, True)
        empty = await update(handle, "decide", {**YES, "approval_id": first.id, "verdict": "answer"})
        assert (empty.accepted, "`answer`" in empty.message) == (False, True)
        answer = {"verdict": "answer", "approver": "kim"}
        await handle.signal("message", HELLO)  # is for the next turn, and changes nothing about this one
        await handle.signal("decide", {**answer, "approval_id": second.id, "answer": False})
        await until(handle, lambda s: [a.id for a in s.approvals] == [first.id])
        await handle.signal("decide", {**answer, "approval_id": first.id, "answer": "billing"})
        result = await handle.result()
    assert (result.outcome, result.summary) == (RunOutcome.COMPLETED, "desk billing, urgent False")
    assert {d.approval.id: d.decision.answer for d in result.decisions} == {first.id: "billing", second.id: False}
    assert result.turns == 2  # the message was read by a turn of its own


@pytest.mark.parametrize("options", [{}, {"max_cached_workflows": 0}], ids=["cached", "uncached"])
async def test_a_question_survives_the_death_of_every_worker(lite: Stage, options: Json) -> None:
    spec = asking(urgent, steps=[StepSpec(name="talk", tools=[], critical=False)])
    async with lite.worker(**options):
        handle = await lite.start(spec)
        waiting = await until(handle, lambda s: len(s.approvals) == 1)
        assert [step.name for step in waiting.steps] == ["talk"]  # what it is about to do is known by then
    await handle.signal("decide", {"approval_id": "q1", "verdict": "answer", "approver": "kim", "answer": {"a": [1]}})
    async with lite.worker(**options):
        assert (await handle.result()).summary == "urgent {'a': [1]}"


# ------------------------------------------------------------------ message


async def test_a_message_is_read_with_the_next_turn_and_interrupts_no_call(lite: Stage) -> None:
    world, gate = World(), asyncio.Event()
    lite.model.script = sequence(call(("slow", {})), say("ended"))
    async with lite.worker():
        handle = await lite.start(agent(world.tool("slow", gate=gate)))
        await world.saw("begin slow#1")
        reply = await update(handle, "message", HELLO)
        assert (reply.accepted, reply.message) == (
            True,
            "nurse.kim's message is for turn 2; it does not interrupt slow",
        )
        assert len(lite.model.requests) == 1
        gate.set()
        result = await handle.result()
    assert world.log == ["begin slow#1", "done slow#1"]
    assert [m["content"] for m in told(lite)[-2:]] == [
        "slow#1 done",
        "Message from nurse.kim: the family arrives at noon",
    ]
    assert result.turns == 2
    assert any("Message from nurse.kim" in note for note in result.notes)


async def test_a_message_during_the_last_turn_is_still_read(lite: Stage) -> None:
    def script(messages: list[Json]) -> Json:
        return say("heard it" if "Message from" in str(messages) else "ended without")

    lite.model.script, lite.model.gate = script, asyncio.Event()
    async with lite.worker():
        handle = await lite.start(agent(World().tool("book"), steps=()))
        async with asyncio.timeout(PATIENCE_S):
            while not lite.model.requests:
                await asyncio.sleep(0.01)
        await handle.signal("message", HELLO)
        await until(handle, lambda s: bool(s.notes))
        lite.model.gate.set()
        result = await handle.result()
    assert (result.turns, result.summary) == (2, "heard it")


BAD: dict[str, tuple[list[str], str]] = {
    "no input": ([], "expected one JSON object"),
    "a text": (["--input", '"hello"'], 'got "hello"'),
    "nobody": (["--input", '{"text": "hello"}'], "by: Field required"),
    "nothing": (["--input", '{"text": "", "by": "x"}'], "text: String should have at least 1 character"),
}


@pytest.mark.parametrize("open_end", [False, True], ids=["done", "an end is open"])
async def test_a_message_after_the_last_turn_does_not_undo_what_is_done(lite: Stage, open_end: bool) -> None:
    world = World()
    errors = [TimeoutError()] if open_end else []
    spec = agent(world.tool("send"), world.tool("mail", Effect.MANUAL, errors=errors, undo=None), max_turns=2)

    def script(messages: list[Json]) -> Json:
        if len(messages) == 2:
            return call(("send", {"n": 1}), ("mail", {}))
        lite.model.gate = thinking
        return say("ended")

    thinking = asyncio.Event()
    lite.model.script = script
    async with lite.worker():
        handle = await lite.start(spec)
        if open_end:
            thinking.set()
            await until(handle, lambda s: s.phase is Phase.WAITING_HUMAN and s.turn == 2)
            await at_rest(handle)
        else:
            await until(handle, lambda s: s.turn == 2)
        reply = await update(handle, "message", HELLO)
        assert reply.accepted, reply.message
        thinking.set()
        if open_end:
            await handle.signal("decide", {**YES, "approval_id": "o2", "verdict": "happened"})
        result = await handle.result()
    assert (result.outcome, result.summary, result.turns) == (RunOutcome.COMPLETED, "ended", 2)
    assert not any(each.startswith("undo") for each in world.log)
    assert any("1 messages came after the last turn" in each for each in result.notes)


async def test_a_bad_message_is_noted_and_sticks_nothing(lite: Stage) -> None:
    world = World()
    lite.model.script = sequence(call(("send", {})), say("ended"))
    async with lite.worker():
        handle = await lite.start(agent(world.tool("send", approval=True)))
        await until(handle, lambda s: len(s.approvals) == 1)
        for arguments, complaint in BAD.values():
            at = ["workflow", "signal", "--workflow-id", handle.id, "--name", "message", *arguments]
            assert (await temporal_cli(lite, *at)).returncode == 0
            await until(handle, lambda s, c=complaint: bool(s.notes) and c in s.notes[-1])
        long = await update(handle, "message", {"text": "x" * 10_001, "by": "x"})
        assert (long.accepted, "at most 10000 characters" in long.message) == (False, True)
        for _ in range(20):
            reply = await update(handle, "message", HELLO)
        assert reply.accepted, reply.message
        many = await update(handle, "message", HELLO)
        assert (many.accepted, "20 messages are unread" in many.message) == (False, True)
        await handle.signal("decide", YES)
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
    assert sum("Message from" in str(m.get("content")) for m in told(lite)) == 20


async def test_a_message_wakes_a_run_that_waits_for_an_open_end(lite: Stage) -> None:
    """The model has said its last words, and a person is asked how a critical call ended."""
    world = World()

    def script(messages: list[Json]) -> Json:
        if messages[-1]["role"] == "user" and len(messages) == 2:
            return call(("mail", {}))
        return say("heard" if "Message from" in str(messages) else "all said")

    lite.model.script = script
    spec = agent(world.tool("mail", Effect.MANUAL, errors=[TimeoutError()], undo=None, retries=0))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: s.phase is Phase.WAITING_HUMAN and s.turn == 2)
        await at_rest(handle)
        await handle.signal("message", HELLO)
        await until(handle, lambda s: s.turn == 3 and s.phase is Phase.WAITING_HUMAN)
        await handle.signal("decide", {**YES, "approval_id": "o1", "verdict": "happened"})
        result = await handle.result()
    assert (result.outcome, result.turns) == (RunOutcome.COMPLETED, 4)
    assert result.summary == "heard"
