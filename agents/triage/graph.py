"""START → classify → clinical | appointments | billing, each in a loop with its tools."""

from __future__ import annotations

import json
from typing import Any

from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import interrupt

from agents.triage.prompts import CLASSIFY, DESKS
from agents.triage.tools import clinic_facts, open_ticket, send_reply
from holdfast.authoring.tools import Tool
from holdfast.reasoning.default_graph import Conversation
from holdfast.reasoning.graph import Turn, begin_at, tools

TOOLS: dict[str, tuple[Tool, ...]] = {
    "clinical": (open_ticket,),
    "appointments": (clinic_facts, open_ticket, send_reply),
    "billing": (clinic_facts, send_reply),
}


class State(Conversation):
    desk: str


async def classify(state: State, runtime: Runtime[Turn]) -> dict[str, Any]:
    mail = {"role": "user", "content": json.dumps(state["input"], ensure_ascii=False)}
    answer = await runtime.context.ask([{"role": "system", "content": CLASSIFY}, mail], tools=())
    desk = _desk(answer.text)
    question = "Which desk is this message for?"
    while desk not in DESKS:
        # The node runs again from the top after the answer; the model's answer is recorded and not asked for again.
        reply = interrupt({"question": question, "desks": list(DESKS), "mail": state["input"], "role": "front desk"})
        desk = _desk(reply)
        question = f"{reply!r} is no desk. Which of these is the message for?"
    return {"desk": desk, "messages": [mail]}


def _desk(words: Any) -> str:
    """Returns the desk that an answer names: its last word, because models often put words before it."""
    return words.lower().strip(" .\n").split()[-1] if isinstance(words, str) and words.strip(" .\n") else ""


def answers_for(desk: str) -> Any:
    """Returns the node of a desk: it has its own instructions and tools, and shares the conversation."""

    async def node(state: State, runtime: Runtime[Turn]) -> dict[str, Any]:
        system = {"role": "system", "content": DESKS[desk]}
        answer = await runtime.context.ask([system, *state["messages"]], tools=TOOLS[desk], must_call=True)
        return {"messages": [answer.message]}

    return node


def build() -> StateGraph[Any, Any, Any, Any]:
    graph = StateGraph(State, context_schema=Turn)
    graph.add_node("classify", classify)
    graph.add_conditional_edges(START, begin_at("classify"), ["classify", *(f"{desk}_tools" for desk in DESKS)])
    graph.add_conditional_edges("classify", lambda state: state["desk"], list(DESKS))
    for desk in DESKS:
        graph.add_node(desk, answers_for(desk))
        graph.add_node(f"{desk}_tools", tools(then=desk, offered=TOOLS[desk]))
        graph.add_edge(desk, f"{desk}_tools")
    return graph


GRAPH = build()
