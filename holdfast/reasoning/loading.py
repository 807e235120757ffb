"""Loads the agents' graphs: checks and compiles each graph once, in the processes that run agents."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, is_typeddict

from langgraph.graph import START, StateGraph
from langgraph.graph.state import CompiledStateGraph

from holdfast.authoring import registry
from holdfast.reasoning import default_graph
from holdfast.reasoning.graph import Begin, Tools, TurnState


def load_graphs() -> None:
    """Loads the graph of every agent. An agent whose graph cannot run is broken from then on.

    Raises BrokenAgent when agents from outside `agents/` declare a service differently.
    """
    registry.services()
    for name, spec in registry.agents().items():
        if spec.graph is not None:
            try:
                compiled(spec.graph, name)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - an agent's own code; the error is kept and shown
                registry.breaks(name, registry.file_with(name, spec.graph), error)


@cache
def compiled(own: StateGraph[Any, Any, Any, Any] | str | None, agent: str) -> CompiledStateGraph[Any, Any, Any, Any]:
    """Returns an agent's compiled graph. Raises TypeError when it cannot run, and any error of importing its module."""
    if own is None:
        return _looping()
    if isinstance(own, str):
        module, _, name = own.partition(":")
        found: Any = getattr(import_module(module), name)
        check(found, agent)
        return found.compile()
    check(own, agent)
    return own.compile()


@cache
def _looping() -> CompiledStateGraph[Any, Any, Any, Any]:
    """Returns the one graph of all agents without their own."""
    return default_graph.build().compile()


def check(graph: Any, agent: str) -> None:
    """Raises TypeError when a graph cannot run as an agent's."""
    if not isinstance(graph, StateGraph):
        raise TypeError(f"agent {agent}: its graph has to be a StateGraph, not compiled; it is {type(graph).__name__}")
    schema = graph.state_schema
    missing = TurnState.__annotations__.keys() - graph.channels.keys()
    if missing or not is_typeddict(schema):
        lacks = f"; it lacks {', '.join(sorted(missing))}" if missing else ""
        raise TypeError(f"agent {agent}: its graph's state has to be a TypedDict that extends TurnState{lacks}")
    nodes = {name: _function(node.runnable) for name, node in graph.nodes.items()}
    deciding = [name for name, node in nodes.items() if isinstance(node, Tools)]
    for name, node in nodes.items():
        if isinstance(node, Tools) and node.then not in nodes:
            raise TypeError(f"agent {agent}: node {name} goes on at {node.then!r}, and there is no such node")
        if isinstance(node, Tools) and node.messages not in graph.channels:
            raise TypeError(f"agent {agent}: node {name} reads the messages at {node.messages!r}, which no state has")
    for start, end in graph.edges:
        if start in deciding:
            raise TypeError(
                f"agent {agent}: node {start} chooses the next node itself, by tools(then=…); remove its edge to {end}"
            )
    entries = [_function(branch.path) for branch in graph.branches[START].values()] if START in graph.branches else []
    if lost := [each.node for each in entries if isinstance(each, Begin) and each.node not in nodes]:
        raise TypeError(f"agent {agent}: its graph begins at {lost[0]!r}, and there is no such node")
    if deciding and not any(isinstance(each, Begin) for each in entries):
        raise TypeError(
            f"agent {agent}: a turn goes on at node {deciding[0]}, so its graph has to begin with"
            " add_conditional_edges(START, begin_at(…))"
        )


def _function(runnable: Any) -> Any:
    """Returns the function that a node or a branch was made from."""
    return getattr(runnable, "func", None) or getattr(runnable, "afunc", None) or runnable
