"""The graph for one document: code, not a model, decides which stage is next."""

from __future__ import annotations

from typing import Any

from langgraph.graph import START, StateGraph

from agents.contracts.documents import located
from holdfast import Json, item_id
from holdfast.reasoning.graph import Turn, TurnState, answers, calls, final


class State(TurnState):
    done: dict[str, Json]
    """The result of each stage, by its tool's name."""


def route(state: State) -> dict[str, Any]:
    """Decides the next stage, from the results of the stages before it."""
    given = state["input"]
    done = {**state.get("done", {}), **{each.tool: each.result for each in answers(state) if each.ok}}
    if bad := next((each for each in answers(state) if not each.ok), None):
        return {"decision": final(f"{bad.tool}: {bad.content}")}
    workspace = given["workspace"]
    if "read" not in done:
        decision = calls(("read", {"path": given["path"], "workspace": workspace}))
    elif "extract" not in done:
        decision = calls(("extract", {"text": done["read"]["text"], "workspace": workspace}))
    elif "summarise" not in done:
        decision = calls(("summarise", {"terms": done["extract"]["terms"], "workspace": workspace}))
    elif "save" not in done:
        name = given["name"] or located(given["path"]).name
        result = {"document": done["read"], "extracted": done["extract"], "summarised": done["summarise"]}
        told = {"id": given["id"] or item_id(given["path"]), "name": name, "workspace": workspace}
        decision = calls(("save", {**told, **result}))
    else:
        decision = final(f"{done['save']['saved']}, extracted by {done['extract']['by']}")
    return {"decision": decision, "done": done}


GRAPH = StateGraph(State, context_schema=Turn)
GRAPH.add_node("route", route)
GRAPH.add_edge(START, "route")
