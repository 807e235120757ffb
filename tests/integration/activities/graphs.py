"""Small graphs for the tests of graphs of one's own."""

from __future__ import annotations

import operator
from typing import Annotated, Any

from langgraph.graph import START, StateGraph

from holdfast.contracts.turn import PlanRequest, PlanResult
from holdfast.reasoning.graph import Turn, TurnState
from tests.fixtures.world import World, agent
from tests.integration.activities.conftest import Process


class State(TurnState):
    log: Annotated[list[str], operator.add]


def line(*nodes: Any) -> StateGraph[Any, Any, Any, Any]:
    """These nodes one after the other."""
    graph = StateGraph(State, context_schema=Turn)
    graph.add_sequence([(node.__name__, node) for node in nodes])
    graph.add_edge(START, nodes[0].__name__)
    return graph


def of(graph: Any) -> PlanRequest:
    """The first turn of a run of an agent with this graph and the tools `book` and `look`."""
    world = World()
    spec = agent(world.tool("book"), world.tool("look"), graph=graph)
    return PlanRequest(agent=spec.name, key_base=f"wf/{spec.name}", turn=1, input={"what": "y"})


def after(request: PlanRequest, result: PlanResult, *told: str, **more: Any) -> PlanRequest:
    """The turn after, which hears these answers."""
    changed = {"turn": request.turn + 1, "base": result.checkpoint, "answers": list(told), "input": None}
    return request.model_copy(update=changed | more)


def asked(process: Process) -> list[str]:
    """The last words of every question that reached the model."""
    return [messages[-1]["content"] for _, messages in process.model.requests]
