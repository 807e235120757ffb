"""The graph of an agent that brings none: model → check → (model again | end).

`model` assembles the context and asks; `check` validates what came back: it routes to a decision, or re-asks with the
validation error, twice at most. Each node's end is a checkpoint, so a crash between the two resumes at `check`.
Messages are plain OpenAI dicts: what is sent is what is stored.
"""

from __future__ import annotations

import operator
from typing import Annotated, Any

from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime

from holdfast.contracts import Json
from holdfast.conversation import inbox_messages
from holdfast.graph import Turn, TurnState, answers, tools


class Conversation(TurnState):
    """The state of a graph with one conversation."""

    messages: Annotated[list[Json], operator.add]
    """All turns of it, as OpenAI dicts."""


async def _model(state: Conversation, runtime: Runtime[Turn]) -> dict[str, Any]:
    new: list[Json] = []
    if not state["heard"]:
        if not state["messages"]:
            new = runtime.context.spec.messages(state["input"])
        new += inbox_messages(state["messages"], [each.content for each in answers(state)], state["notices"])
    answer = await runtime.context.ask(state["messages"] + new, must_call=True)
    # Heard, also on behalf of `check`: the answers came here straight from START, which saves a superstep.
    return {"messages": [*new, answer.message], "heard": {} if state["heard"] else {"check": 0}}


def build() -> StateGraph[Any, Any, Any, Any]:
    graph = StateGraph(Conversation, context_schema=Turn)
    graph.add_node("model", _model)
    graph.add_node("check", tools(then="model"), destinations=("model", "__end__"))
    graph.add_edge(START, "model")
    graph.add_edge("model", "check")
    return graph
