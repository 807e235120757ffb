"""What the platform does with a graph: checks it, begins a turn of it, and reads the decision that it ended with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, is_typeddict

from langgraph.graph import START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from pydantic import ValidationError

from holdfast import loop, outside
from holdfast.agent import AgentSpec
from holdfast.contracts import Decision, Json, OutcomeStatus, ToolCall
from holdfast.conversation import MAX_ARGUMENTS, MAX_FINAL, MAX_TOGETHER, as_json, said
from holdfast.graph import BadGraph, Begin, Tools, TurnState, calls
from holdfast.tools import explain
from holdfast.wording import did_you_mean

DECISION = calls().keys()


def turn_input(
    value: Json | None, told: Sequence[tuple[str, OutcomeStatus]], notices: Sequence[str], before: Json | None
) -> Json:
    """What a turn begins with.

    value: the run's input, with turn 1. told: content and status of the answers to the calls of `before`, in order.
    before: the decision of the turn before.
    """
    made = before["calls"] if before else []
    heard = [
        {
            "tool": call["tool"],
            "arguments": call.get("arguments", {}),
            "status": status.value,
            "content": content,
            "by": call.get("by", ""),
            "id": call.get("id", ""),
        }
        for call, (content, status) in zip(made, told, strict=True)
    ]
    begun: Json = {"answers": heard, "notices": list(notices), "decision": None, "heard": None}
    begun["resume"] = before.get("then", []) if before else []
    return begun if value is None else {**begun, "input": value}


def decision_of(state: Mapping[str, Any], spec: AgentSpec) -> Decision:
    """The decision that a graph ended with. Raises BadGraph when there is none, or a call by code does not validate."""
    made = state.get("decision")
    if made is None:
        last = as_json(state["messages"][-1]) if state.get("messages") else {}
        if last.get("role") == "assistant" and not last.get("tool_calls") and (text := said(last)):
            return Decision(final=text)
        raise BadGraph("the graph ended without a decision: return calls(…) or final(…) as `decision` in some node")
    if not isinstance(made, dict) or made.keys() != DECISION:
        raise BadGraph(f"`decision` has to be what calls(…) or final(…) returns; it is {type(made).__name__}")
    if made["final"] is None and not made["calls"]:
        raise BadGraph("the graph decided to make no calls: to end the run, decide final(…)")
    try:
        decision = Decision(calls=[_by_code(call, spec) for call in made["calls"]], final=made["final"])
        decision.model_dump_json()  # what is no JSON would never get into history
    except (ValueError, RecursionError) as error:
        words = explain(error) if isinstance(error, ValidationError) else str(error)
        raise BadGraph(f"the graph decided what is no JSON: {words}") from None
    if wrong := _too_much(decision, spec):
        raise BadGraph(f"the graph decided too much: {wrong}")
    return decision


def _too_much(decision: Decision, spec: AgentSpec) -> str:
    """What of a decision is more than is taken; a model's was checked by the tools node, one by code is here."""
    if (many := len(decision.calls)) > spec.max_calls:
        return f"{many} calls in one turn, and `max_calls` of agent {spec.name} is {spec.max_calls}"
    for call in decision.calls:
        if wrong := outside.problem(call.arguments, MAX_ARGUMENTS):
            return f"the arguments of {call.tool}: the JSON {wrong}"
    wrong = outside.problem([call.arguments for call in decision.calls], MAX_TOGETHER)
    if wrong:
        return f"the arguments of all calls together: the JSON {wrong}"
    return f"the final words: the text {wrong}" if (wrong := outside.problem(decision.final, MAX_FINAL)) else ""


def _by_code(call: Json, spec: AgentSpec) -> ToolCall:
    if "version" in call:  # a model's, checked by the tools node
        return ToolCall.model_validate(call)
    tool = spec.tool(call["tool"])
    if tool is None:
        there = f"{', '.join(spec.by_name)}{did_you_mean(call['tool'], spec.by_name)}"
        raise BadGraph(f"node {call['by']} calls the tool {call['tool']!r}; the tools are: {there}")
    try:
        return ToolCall(tool=tool.name, arguments=tool.validate(call["arguments"]), version=tool.version)
    except ValidationError as error:
        raise BadGraph(
            f"node {call['by']} calls {tool.name} with arguments that do not fit: {explain(error)}"
        ) from None


@cache
def compiled(own: StateGraph[Any, Any, Any, Any] | str | None, agent: str) -> CompiledStateGraph[Any, Any, Any, Any]:
    """An agent's graph, ready to run. Raises TypeError for one that cannot, and what the import of a named one does."""
    if own is None:
        return _looping()
    if isinstance(own, str):
        module, _, name = own.partition(":")
        found: Any = getattr(import_module(module), name)
        check(found, agent)
        return found.compile()
    return own.compile()


@cache
def _looping() -> CompiledStateGraph[Any, Any, Any, Any]:
    """One for all agents that bring none."""
    return loop.build().compile()


def check(graph: Any, agent: str) -> None:
    """Raises TypeError for a graph that could not run as an agent's."""
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
                f"agent {agent}: node {start} says itself where the graph goes on, by tools(then=…);"
                f" remove its edge to {end}"
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
    """What a node or a branch was made from."""
    return getattr(runnable, "func", None) or getattr(runnable, "afunc", None) or runnable
