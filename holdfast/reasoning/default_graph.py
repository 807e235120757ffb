"""The graph of an agent without its own: one node, `model`, which is one turn.

The node assembles the context and asks the model. When the answer does not validate, it asks again with the error,
twice at most. A node that runs again after a crash gets the recorded answers, so the turn needs one checkpoint, with
its decision. Messages are plain OpenAI dicts, stored as they are sent.
"""

from __future__ import annotations

import operator
from typing import Annotated, Any

from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime

from holdfast.contracts.data import Json
from holdfast.reasoning.conversation import again, inbox_messages, parse
from holdfast.reasoning.graph import Turn, TurnState, answers, decided

MODEL = "model"


class Conversation(TurnState):
    """The state of a graph with one conversation."""

    messages: Annotated[list[Json], operator.add]
    """The messages of all turns, as OpenAI dicts."""


async def _model(state: Conversation, runtime: Runtime[Turn]) -> dict[str, Any]:
    turn, before = runtime.context, state["messages"]
    new = [] if before else turn.spec.messages(state["input"])
    new += inbox_messages(before, [each.content for each in answers(state)], state["notices"])
    tries = 0
    while True:
        answer = await turn.ask(before + new, must_call=True)
        new.append(answer.message)
        decision, problems = parse(answer.message, turn.spec)
        if decision is not None:
            return {"messages": new, "decision": decided(decision, answer.message, MODEL, turn)}
        tries = again(tries, problems)
        new += problems


def build() -> StateGraph[Any, Any, Any, Any]:
    graph = StateGraph(Conversation, context_schema=Turn)
    graph.add_node(MODEL, _model)
    graph.add_edge(START, MODEL)
    return graph
