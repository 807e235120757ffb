"""Builds the input of a graph's turn, and reads and checks the decision that the turn ended with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from holdfast.authoring.agent import AgentSpec
from holdfast.contracts import outside
from holdfast.contracts.data import Json
from holdfast.contracts.failures import explain
from holdfast.contracts.turn import Decision, OutcomeStatus, ToolCall
from holdfast.contracts.wording import did_you_mean
from holdfast.reasoning.conversation import MAX_ARGUMENTS, MAX_FINAL, MAX_TOGETHER, as_json, said
from holdfast.reasoning.graph import BadGraph, calls

DECISION = calls().keys()


def turn_input(
    value: Json | None, told: Sequence[tuple[str, OutcomeStatus]], notices: Sequence[str], before: Json | None
) -> Json:
    """Returns the state that a turn begins with.

    value: the run's input, in turn 1 only. told: content and status of the answers to the calls of `before`, in order.
    before: the previous turn's decision.
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
    """Returns a graph's decision. Raises BadGraph when there is none, or when a call that code decided does not
    validate."""
    made = state.get("decision")
    if made is None:
        last = as_json(state["messages"][-1]) if state.get("messages") else {}
        if last.get("role") == "assistant" and not last.get("tool_calls") and (text := said(last)):
            return Decision(final=text)
        raise BadGraph("the graph ended without a decision: return calls(…) or final(…) as `decision` in some node")
    if not isinstance(made, dict) or made.keys() != DECISION:
        raise BadGraph(f"`decision` has to be what calls(…) or final(…) returns; it is {type(made).__name__}")
    if made["final"] is not None and made["calls"]:
        raise BadGraph("the graph decided calls and a final answer at once: return calls(…) or final(…)")
    if made["final"] is None and not made["calls"]:
        raise BadGraph("the graph decided calls(…) without any call: to end the run, return final(…)")
    try:
        decision = Decision(calls=[_by_code(call, spec) for call in made["calls"]], final=made["final"])
        decision.model_dump_json()  # data that is not JSON would never get into history
    except (ValueError, RecursionError) as error:
        words = explain(error) if isinstance(error, ValidationError) else str(error)
        raise BadGraph(f"the graph's decision is not valid: {words}") from None
    if wrong := _too_much(decision, spec):
        raise BadGraph(f"the graph's decision exceeds a limit: {wrong}")
    return decision


def _too_much(decision: Decision, spec: AgentSpec) -> str:
    """Returns the limit that a decision exceeds, or "". The tools node checks a model's decision, this one code's."""
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
    if "version" in call:  # a model's call, which the tools node has checked
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
