"""Graphs of one's own: what a node asked, decided or finished is not done again, wherever the turn is cut off."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Annotated, Any

import pytest
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime
from temporalio.exceptions import ApplicationError

from activities.plan import Plan
from holdfast.contracts import OutcomeStatus, PlanRequest, PlanResult
from holdfast.graph import Turn, TurnState, answers, calls, final
from tests.activities.conftest import Process
from tests.fixtures.model import say
from tests.fixtures.world import World, agent


class State(TurnState):
    log: Annotated[list[str], operator.add]


async def one(state: State, runtime: Runtime[Turn]) -> dict[str, Any]:
    answer = await runtime.context.ask([{"role": "user", "content": "one"}], tools=())
    return {"log": [f"one {answer.text}"]}


async def two(state: State, runtime: Runtime[Turn]) -> dict[str, Any]:
    answer = await runtime.context.ask([{"role": "user", "content": "two"}], tools=())
    return {"log": [f"two {answer.text}"]}


def ends(state: State) -> dict[str, Any]:
    return {"decision": final(", ".join(state["log"]))}


def line(*nodes: Any, state: Any = State) -> StateGraph[Any, Any, Any, Any]:
    """These nodes one after the other."""
    graph = StateGraph(state, context_schema=Turn)
    graph.add_sequence([(node.__name__, node) for node in nodes])
    graph.add_edge(START, nodes[0].__name__)
    return graph


def of(graph: Any, *, world: World | None = None) -> PlanRequest:
    """The first turn of a run of an agent with this graph and the tools `book` and `look`."""
    world = world or World()
    spec = agent(world.tool("book"), world.tool("look"), graph=graph)
    return PlanRequest(agent=spec.name, key_base="wf/run", turn=1, input={"what": "y"})


def after(request: PlanRequest, result: PlanResult, *told: str, **more: Any) -> PlanRequest:
    """The turn after, which hears these answers."""
    changed = {"turn": request.turn + 1, "base": result.checkpoint, "answers": list(told), "input": None}
    return request.model_copy(update=changed | more)


@pytest.fixture
def plan(process: Process) -> Any:
    process.model.script = lambda messages: say(f"answer {messages[-1]['content']}")
    return Plan(process.runtime).plan


def asked(process: Process) -> Sequence[str]:
    return [messages[-1]["content"] for _, messages in process.model.requests]


# ------------------------------------------------------------------ code that decides


def walk(state: State) -> dict[str, Any]:
    """Books, looks at what was booked, and ends."""
    heard = answers(state)
    if not heard:
        return {"decision": calls(("book", {"n": 1}), ("book", {"n": 2}))}
    if heard[0].tool == "book":
        return {"log": [each.content for each in heard], "decision": calls(("look", {"n": heard[1].arguments["n"]}))}
    return {"decision": final(f"{state['log']} {heard[0].result['seen']} {heard[0].status}")}


async def test_a_graph_without_a_model_decides_by_code_and_reads_the_answers(process: Process, plan: Any) -> None:
    request = of(line(walk))
    first = await process.run(plan, request)
    assert [(each.tool, each.arguments, each.version) for each in first.calls] == [
        ("book", {"n": 1}, "1"),
        ("book", {"n": 2}, "1"),
    ]
    request = after(request, first, "booked", "booked too")
    second = await process.run(plan, request)
    assert [(each.tool, each.arguments) for each in second.calls] == [("look", {"n": 2})]
    failed = [OutcomeStatus.FAILED]
    third = await process.run(plan, after(request, second, '{"seen": 3}', statuses=failed))
    assert third.final == "['booked', 'booked too'] 3 failed"
    assert (third.usage.calls, third.model, process.model.requests) == (0, "", [])


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (("boook", {}), "node walk calls the tool 'boook'; the tools are: book, look"),
        (("book", {"n": "x"}), "node walk calls book with arguments that do not fit: n: Input should be a valid int"),
    ],
)
async def test_a_call_by_code_that_does_not_validate_names_its_node(
    process: Process, plan: Any, wanted: Any, words: str
) -> None:
    def walk(state: State) -> dict[str, Any]:
        return {"decision": calls(wanted)}

    request = of(line(walk))
    with pytest.raises(ApplicationError, match=words) as caught:
        await process.run(plan, request)
    assert caught.value.non_retryable
