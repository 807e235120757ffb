"""One turn of an agent as a LangGraph graph: model → check → (model again | end).

`model` assembles the context and asks; `check` validates what came back: it routes to a decision, or re-asks with the
validation error, twice at most. Each node's end is a checkpoint, so a crash between the two resumes at `check`.
Messages are plain OpenAI dicts: what is sent is what is stored.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command
from pydantic import ValidationError

from holdfast.agent import AgentSpec
from holdfast.contracts import Decision, Json, ToolCall, Usage
from holdfast.models import ModelAnswer
from holdfast.reliability import faults
from holdfast.reliability.faults import Point
from holdfast.tools import explain

MAX_REASKS = 2


class MalformedOutput(Exception):
    """The model's output stayed invalid after all re-asks."""


class TurnState(TypedDict):
    messages: Annotated[list[Json], operator.add]
    """The conversation, over all turns."""
    inbox: list[Json]
    """Messages that this turn adds before the model is asked."""
    asks: int
    usage: Json
    model: NotRequired[str]
    new_model: str
    """The model that answered, when it is another than the turn before had."""
    decision: Json | None
    withdrawn: NotRequired[list[str]]
    """Tools that the model was told it cannot have for now."""


@dataclass(frozen=True)
class TurnContext:
    """What the nodes need and no checkpoint holds."""

    spec: AgentSpec
    ask: Callable[[Sequence[Json], int], Awaitable[ModelAnswer]]
    """`await ask(messages, n)`: the n-th model call of this turn (from 1), recorded under its own key."""
    where: str
    """Names the turn at crash points."""


def turn_input(inbox: list[Json], withdrawn: list[str] | None = None) -> TurnState:
    """The input of a turn that adds these messages; `withdrawn` when the tools that are gone are others than before."""
    value: TurnState = {
        "messages": [],
        "inbox": inbox,
        "asks": 0,
        "usage": {},
        "new_model": "",
        "decision": None,
    }
    if withdrawn is not None:
        value["withdrawn"] = withdrawn
    return value


def inbox_messages(conversation: Sequence[Json], answers: Sequence[str], notices: Sequence[str]) -> list[Json]:
    """What a turn has to hear: answers to the calls that the conversation ends with, in their order, then notices."""
    calls = conversation[-1].get("tool_calls") or [] if conversation else []
    told = [
        {"role": "tool", "tool_call_id": call["id"], "content": text} for call, text in zip(calls, answers, strict=True)
    ]
    return told + [{"role": "user", "content": text} for text in notices]


async def _model(state: TurnState, runtime: Runtime[TurnContext]) -> Json:
    new = state["inbox"]
    asks = state["asks"] + 1
    answer = await runtime.context.ask(state["messages"] + new, asks)
    usage = Usage.model_validate(state["usage"]) + answer.usage
    label = f"{answer.model} (simulated)" if answer.simulated else answer.model
    label += " (fallback)" if answer.origin else ""
    return {
        "messages": [*new, answer.message],
        "inbox": [],
        "asks": asks,
        "usage": usage.model_dump(exclude_defaults=True),
        "model": label,
        "new_model": state["new_model"] if label == state.get("model") else label,
    }


async def _check(state: TurnState, runtime: Runtime[TurnContext]) -> Command[Any]:
    faults.reached(Point.NODE_DONE, runtime.context.where)
    message = state["messages"][-1]
    decision, problems = parse(message, runtime.context.spec)
    if decision is not None:
        return Command(goto=END, update={"decision": decision.model_dump(mode="json", exclude_defaults=True)})
    if state["asks"] > MAX_REASKS:
        raise MalformedOutput(
            f"the model's output was invalid {state['asks']} times in a row; the last error: {problems[-1]['content']}"
        )
    return Command(goto="model", update={"inbox": problems})


def parse(message: Json, spec: AgentSpec) -> tuple[Decision | None, list[Json]]:
    """The decision that a model message stands for, or None and the messages that tell the model what is wrong."""
    calls = message.get("tool_calls") or []
    if not calls:
        text = (message.get("content") or "").strip()
        if text:
            return Decision(final=text), []
        return None, [{"role": "user", "content": "Your answer was empty. Call a tool, or say how the task ended."}]
    parsed = [(call["id"], *_parse_call(call, spec)) for call in calls]
    if all(good is not None for _, good, _ in parsed):
        return Decision(calls=[good for _, good, _ in parsed if good is not None]), []
    kept = "not run, because another call of the same answer was invalid; send all the calls again"
    return None, [
        {"role": "tool", "tool_call_id": call_id, "content": f"error: {problem or kept}"}
        for call_id, _, problem in parsed
    ]


def _parse_call(call: Json, spec: AgentSpec) -> tuple[ToolCall | None, str]:
    name = call["function"]["name"]
    tool = spec.by_name.get(name)
    if tool is None:
        return None, f"there is no tool named {name!r}; the tools are: {', '.join(spec.by_name)}"
    try:
        arguments: Any = json.loads(call["function"]["arguments"] or "{}")
    except json.JSONDecodeError as error:
        return None, f"the arguments of {name} are not valid JSON ({error}); send the call again"
    try:
        valid = tool.validate(arguments)
    except ValidationError as error:
        return None, f"the arguments of {name} do not fit its schema: {explain(error)}"
    return ToolCall(tool=name, arguments=valid, version=tool.version), ""


def build() -> StateGraph[TurnState, TurnContext]:
    """The graph of a turn, not yet compiled: each call brings its own checkpointer."""
    graph = StateGraph(TurnState, context_schema=TurnContext)
    graph.add_node("model", _model)
    graph.add_node("check", _check, destinations=("model", END))
    graph.add_edge(START, "model")
    graph.add_edge("model", "check")
    return graph
