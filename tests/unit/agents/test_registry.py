"""Agents whose graph is only named: what is wrong with it is said by who runs them, in one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from holdfast.authoring import registry
from holdfast.authoring.agent import AgentSpec
from holdfast.reasoning.loading import compiled, load_graphs
from tests.fixtures.world import Anything

GOOD = """
from langgraph.graph import START, StateGraph

from holdfast.reasoning.graph import Turn, TurnState, final

GRAPH = StateGraph(TurnState, context_schema=Turn)
GRAPH.add_node("end", lambda state: {"decision": final("done")})
GRAPH.add_edge(START, "end")
"""


@pytest.fixture
def mind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the module `mind`, which an agent names its graph in."""
    compiled.cache_clear()  # another test's graph has the same name
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mind", raising=False)
    named = AgentSpec("named", "d", "i", Anything, (), graph="mind:GRAPH")
    monkeypatch.setattr(registry, "_added", {"named": named})
    return tmp_path / "mind.py"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "mind.py: ModuleNotFoundError: No module named 'mind'"),
        ("MIND = 1", "mind.py: AttributeError: module 'mind' has no attribute 'GRAPH'"),
        ("GRAPH = 1", "mind.py: TypeError: agent named: its graph has to be a StateGraph, not compiled; it is int"),
        (f"{GOOD}\nGRAPH = GRAPH.compile()", "mind.py: TypeError: agent named: its graph has to be a StateGraph, not"),
        ("import nowhere", "mind.py: ModuleNotFoundError: No module named 'nowhere'"),
        ("def build(:", "mind.py: SyntaxError: invalid syntax (mind.py, line 1)"),
        ("raise LookupError('no ward')", "mind.py: LookupError: no ward"),
        (
            GOOD.replace('START, "end"', 'START, "ende"'),
            "mind.py: ValueError: Found edge ending at unknown node `ende`",
        ),
    ],
)
def test_a_graph_that_cannot_be_had_is_said_in_a_line(
    mind: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, words: str
) -> None:
    if text is not None:
        mind.write_text(text)
    monkeypatch.setattr(registry._found(), "broken", {})  # pyright: ignore[reportPrivateUsage]
    load_graphs()
    said = str(registry.broken()["named"])
    assert said.startswith(words)
    assert "\n" not in said
    assert "named" not in registry.agents()
    with pytest.raises(registry.BrokenAgent, match=re.escape(said)):
        registry.startable("named")


def test_commands_that_only_list_agents_never_import_a_graph(mind: Path) -> None:
    mind.write_text("raise LookupError('imported')")
    assert "named" in registry.agents()


def test_a_graph_is_named_by_module_and_name() -> None:
    with pytest.raises(TypeError, match=r"its graph is named 'mind', not like package\.module:name"):
        AgentSpec("named", "d", "i", Anything, (), graph="mind")


def test_a_graph_that_can_be_had_is_loaded(mind: Path) -> None:
    mind.write_text(GOOD)
    load_graphs()
    assert "mind" in sys.modules
