"""The graph of an agent without its own: model → check → (model again | end).

`model` assembles the context and asks the model. `check` validates the answer: it ends the turn with a decision, or
asks again with the validation error, twice at most. Each node ends with a checkpoint, so after a crash between the two
the turn resumes at `check`. Messages are plain OpenAI dicts, stored as they are sent.
"""

from __future__ import annotations

import operator
from typing import Annotated, Any

from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime

from holdfast.contracts.data import Json
from holdfast.reasoning.conversation import inbox_messages
from holdfast.reasoning.graph import Turn, TurnState, answers, tools


class Conversation(TurnState):
    """The state of a graph with one conversation."""

    messages: Annotated[list[Json], operator.add]
    """The messages of all turns, as OpenAI dicts."""


async def _model(state: Conversation, runtime: Runtime[Turn]) -> dict[str, Any]:
    new: list[Json] = []
    if not state["heard"]:
        if not state["messages"]:
            new = runtime.context.spec.messages(state["input"])
        new += inbox_messages(state["messages"], [each.content for each in answers(state)], state["notices"])
    answer = await runtime.context.ask(state["messages"] + new, must_call=True)
    # Marked as heard for `check` too: the answers come here straight from START, which saves a superstep.
    return {"messages": [*new, answer.message], "heard": {} if state["heard"] else {"check": 0}}


def build() -> StateGraph[Any, Any, Any, Any]:
    graph = StateGraph(Conversation, context_schema=Turn)
    graph.add_node("model", _model)
    graph.add_node("check", tools(then="model"), destinations=("model", "__end__"))
    graph.add_edge(START, "model")
    graph.add_edge("model", "check")
    return graph
