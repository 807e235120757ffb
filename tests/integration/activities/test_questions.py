"""`interrupt()` in a graph is a question to a person: asked once, answered once, wherever the turn is cut off."""

from __future__ import annotations

from typing import Any

import pytest
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import interrupt
from temporalio.exceptions import ApplicationError

from activities.plan import Plan
from holdfast.contracts.turn import PlanRequest, PlanResult, Question, Reply
from holdfast.reasoning.graph import Turn, answers, calls, final
from holdfast.reliability.crash_points import Point
from holdfast.testing.model import say
from tests.integration.activities.conftest import Process
from tests.integration.activities.graphs import State, after, asked, line, of


@pytest.fixture
def plan(process: Process) -> Any:
    process.model.script = lambda messages: say(f"answer {messages[-1]['content']}")
    return Plan(process.runtime).plan


def replied(request: PlanRequest, *replies: tuple[Question, Any]) -> PlanRequest:
    """The same turn, with these answers of people."""
    return request.model_copy(update={"replies": [Reply(id=asked.id, value=value) for asked, value in replies]})


def end(state: State) -> dict[str, Any]:
    return {"decision": final(", ".join(state["log"]))}


async def ask_twice(state: State, runtime: Runtime[Turn]) -> dict[str, Any]:
    """Asks the model, a person, the model about that, and another person."""
    first = await runtime.context.ask([{"role": "user", "content": "model?"}], tools=())
    person = interrupt(f"person? ({first.text})")
    second = await runtime.context.ask([{"role": "user", "content": f"{person}?"}], tools=())
    other = interrupt({"question": "other?", "choices": [1, 2]})
    return {"log": [first.text, person, second.text, str(other)]}


async def test_a_node_asks_two_people_one_after_the_other(process: Process, plan: Any) -> None:
    request = of(line(ask_twice, end))
    waiting = await process.run(plan, request)
    (first,) = waiting.questions
    assert (first.text, first.data, waiting.calls, waiting.final) == ("person? (answer model?)", None, [], None)
    waiting = await process.run(plan, replied(request, (first, "yes")))
    (second,) = waiting.questions
    assert (second.text, second.data) == ("other?", {"question": "other?", "choices": [1, 2]})
    assert first.id != second.id
    request = replied(request, (first, "yes"), (second, 2))
    result = await process.run(plan, request)
    assert (result.final, result.questions) == ("answer model?, yes, answer yes?, 2", [])
    assert asked(process) == ["model?", "yes?"], "what the model has answered is not asked again"
    assert result.usage.calls == 2
    assert await process.run(plan, request) == result


async def test_the_same_request_again_asks_the_same_question(process: Process, plan: Any) -> None:
    """Its completion was lost, or the worker died after the question was stored."""
    request = of(line(ask_twice, end))
    once = await process.run(plan, request)
    assert await process.run(plan, request) == once
    request = replied(request, (once.questions[0], "yes"))
    twice = await process.run(plan, request)
    assert await process.run(plan, request) == twice
    assert asked(process) == ["model?", "yes?"]


@pytest.mark.parametrize("point", [Point.MODEL_ANSWERED, Point.MODEL_RECORDED, Point.DECIDED])
async def test_a_crash_after_the_answer_uses_it_again(process: Process, plan: Any, point: Point) -> None:
    async def ask_then_think(state: State, runtime: Runtime[Turn]) -> dict[str, Any]:
        person = interrupt("person?")
        answer = await runtime.context.ask([{"role": "user", "content": person}], tools=())
        return {"log": [answer.text]}

    request = of(line(ask_then_think, end))
    request = replied(request, ((await process.run(plan, request)).questions[0], "yes"))
    await process.dies(point, plan, request)
    assert (await process.run(plan, request)).final == "answer yes"
    assert asked(process) == ["yes"] * (2 if point is Point.MODEL_ANSWERED else 1)


@pytest.mark.parametrize("value", [None, False, 0, "", {"a": [1]}])
async def test_any_json_may_be_an_answer(process: Process, plan: Any, value: Any) -> None:
    def ask(state: State) -> dict[str, Any]:
        return {"log": [repr(interrupt("?"))]}

    request = of(line(ask, end))
    waiting = await process.run(plan, request)
    result = await process.run(plan, replied(request, (waiting.questions[0], value)))
    assert result.final == repr(value)


def both(*nodes: Any) -> StateGraph[Any, Any, Any, Any]:
    """These nodes side by side, then the end."""
    graph = StateGraph(State, context_schema=Turn)
    graph.add_node("end", end)
    for n, node in enumerate(nodes):
        graph.add_node(f"node{n}", node)
        graph.add_edge(START, f"node{n}")
    graph.add_edge([f"node{n}" for n in range(len(nodes))], "end")
    return graph


async def test_branches_ask_side_by_side_and_are_answered_in_any_order(process: Process, plan: Any) -> None:
    runs: list[str] = []

    def asking(name: str) -> Any:
        def node(state: State) -> dict[str, Any]:
            runs.append(name)
            return {"log": [f"{name} {interrupt(name)}"]}

        return node

    async def model(state: State, runtime: Runtime[Turn]) -> dict[str, Any]:
        runs.append("model")
        await runtime.context.ask([{"role": "user", "content": "model?"}], tools=())
        return {"log": ["model"]}

    request = of(both(asking("a"), asking("b"), model))
    waiting = await process.run(plan, request)
    a, b = sorted(waiting.questions, key=lambda each: each.text)
    still = await process.run(plan, replied(request, (b, 2)))
    assert still.questions == [a]
    result = await process.run(plan, replied(request, (b, 2), (a, 1)))
    assert result.final == "a 1, b 2, model"
    assert runs.count("model") == 1, "a branch that has finished is not run again"
    assert result.usage.calls == 1


async def test_a_subgraph_asks(process: Process, plan: Any) -> None:
    ran: list[str] = []

    def before(state: State) -> dict[str, Any]:
        ran.append("before")
        return {"log": ["before"]}

    def ask(state: State) -> dict[str, Any]:
        return {"log": [interrupt("inside?")]}

    sub = StateGraph(State, context_schema=Turn, output_schema=State)
    sub.add_sequence([before, ask])
    sub.add_edge(START, "before")
    graph = StateGraph(State, context_schema=Turn)
    graph.add_node("sub", sub.compile())
    graph.add_node("end", end)
    graph.add_edge(START, "sub")
    graph.add_edge("sub", "end")
    request = of(graph)
    waiting = await process.run(plan, request)
    assert [each.text for each in waiting.questions] == ["inside?"]
    assert (await process.run(plan, request)).questions == waiting.questions
    result = await process.run(plan, replied(request, (waiting.questions[0], "yes")))
    assert (result.final, ran) == ("before, yes", ["before"])


async def test_a_question_belongs_to_its_turn(process: Process, plan: Any) -> None:
    """The next turn asks anew; an answer of the turn before is not taken for its own."""

    def ask(state: State) -> dict[str, Any]:
        if answers(state):
            return {"decision": final(interrupt("second?"))}
        return {"decision": calls(("book", {"n": interrupt("first?")}))}

    request = of(line(ask))
    waiting: PlanResult = await process.run(plan, request)
    (first,) = waiting.questions
    request = replied(request, (first, 7))
    result = await process.run(plan, request)
    assert [each.arguments for each in result.calls] == [{"n": 7}]
    request = after(request, result, "booked")
    waiting = await process.run(plan, request)
    assert [each.text for each in waiting.questions] == ["second?"]
    done = await process.run(plan, replied(request, (first, 7), (waiting.questions[0], "done")))
    assert done.final == "done"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1, 2}, r"interrupt\(\) takes JSON, for a person reads it; got dict: .*set is not"),
        (float("nan"), r"interrupt\(\) takes JSON that a person can read; got dict, and it has nan, which is no JSON"),
        (object(), r"a graph's state or interrupt\(\) value cannot be stored"),
    ],
)
async def test_a_question_that_is_no_json_is_its_authors_mistake(
    process: Process, plan: Any, value: Any, words: str
) -> None:
    def ask(state: State) -> dict[str, Any]:
        return {"log": [interrupt({"text": "?", "value": value})]}

    with pytest.raises(ApplicationError, match=words) as caught:
        await process.run(plan, of(line(ask)))
    assert caught.value.non_retryable


async def test_state_that_cannot_be_stored_is_its_authors_mistake(process: Process, plan: Any) -> None:
    def keep(state: State) -> dict[str, Any]:
        return {"log": [object()]}

    with pytest.raises(ApplicationError, match=r"a graph's state or interrupt\(\) value cannot be stored") as caught:
        await process.run(plan, of(line(keep, end)))
    assert caught.value.non_retryable
