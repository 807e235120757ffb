"""A process that is killed in a graph of one's own: no model call that was answered is paid again, no node that was
stored runs again."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime
from temporalio.testing import ActivityEnvironment

from activities.plan import Plan
from holdfast.authoring import registry
from holdfast.authoring.agent import AgentSpec
from holdfast.contracts.turn import PlanRequest
from holdfast.engine.runtime import open_runtime
from holdfast.reasoning.graph import Turn, final
from holdfast.settings import Settings
from holdfast.testing.model import say
from tests.fixtures.world import Anything
from tests.integration.activities.conftest import Process
from tests.integration.activities.graphs import State, asked, line

REQUEST = PlanRequest(agent="t-crash", key_base="wf/run", turn=1, input={"what": "y"})


class Nodes:
    """Nodes that note in a file that they ran, ask the model, and die where they should."""

    def __init__(self, notes: Path, dies: str = "", db: Any = None) -> None:
        self._notes = notes
        self._dies = dies
        self.db = db

    def asks(self, name: str, after: str = "") -> Callable[..., Any]:
        """after: waits, when it is to die, until that node's writes are stored."""

        async def node(state: State, runtime: Runtime[Turn]) -> dict[str, Any]:
            with self._notes.open("a") as out:
                out.write(f"{name}\n")
            answer = await runtime.context.ask([{"role": "user", "content": name}], tools=())
            if name == self._dies:
                while after and not await self.db.one(
                    "SELECT 1 FROM checkpoint_writes WHERE task_path LIKE ?", f"%{after}%"
                ):
                    await asyncio.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            return {"log": [answer.text]}

        node.__name__ = name
        return node

    def end(self, state: State) -> dict[str, Any]:
        return {"decision": final(", ".join(sorted(state["log"])))}


def two_models(nodes: Nodes) -> StateGraph[Any, Any, Any, Any]:
    return line(nodes.asks("first"), nodes.asks("second"), nodes.end)


def branches(nodes: Nodes) -> StateGraph[Any, Any, Any, Any]:
    graph = StateGraph(State, context_schema=Turn)
    for name, node in (("first", nodes.asks("first")), ("second", nodes.asks("second", after="first"))):
        graph.add_node(name, node)
        graph.add_edge(START, name)
    graph.add_node("end", nodes.end)
    graph.add_edge(["first", "second"], "end")
    return graph


def subgraph(nodes: Nodes) -> StateGraph[Any, Any, Any, Any]:
    sub = StateGraph(State, context_schema=Turn)
    sub.add_sequence([nodes.asks("first"), nodes.asks("second")])
    sub.add_edge(START, "first")
    graph = StateGraph(State, context_schema=Turn)
    graph.add_node("sub", sub.compile())
    graph.add_node("end", nodes.end)
    graph.add_edge(START, "sub")
    graph.add_edge("sub", "end")
    return graph


SHAPES = {shape.__name__: shape for shape in (two_models, branches, subgraph)}


def declare(shape: str, nodes: Nodes) -> None:
    registry.add(AgentSpec("t-crash", "test", "test", Anything, (), graph=SHAPES[shape](nodes)))


def _run_until_killed(shape: str, url: str, model: str, notes: Path) -> None:
    async def run() -> None:
        runtime = await open_runtime(Settings(database_url=url, openai_base_url=model, model="fake-1"))
        declare(shape, Nodes(notes, dies="second", db=runtime.db))
        await ActivityEnvironment().run(Plan(runtime).plan, REQUEST)

    asyncio.run(run())


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_killed_process_repeats_no_answered_call_and_no_stored_node(
    process: Process, store_url: str, tmp_path: Path, shape: str
) -> None:
    process.model.script = lambda messages: say(f"answer {messages[-1]['content']}")
    notes = tmp_path / "notes"
    spawned = multiprocessing.get_context("spawn").Process(
        target=_run_until_killed, args=(shape, store_url, process.model.url, notes)
    )
    spawned.start()
    await asyncio.to_thread(spawned.join, 60)
    assert spawned.exitcode == -signal.SIGKILL
    assert sorted(notes.read_text().split()) == ["first", "second"]

    declare(shape, Nodes(notes))
    result = await process.run(Plan(process.runtime).plan, REQUEST)
    assert result.final == "answer first, answer second"
    assert sorted(notes.read_text().split()) == ["first", "second", "second"], "only the node that was cut off"
    assert sorted(asked(process)) == ["first", "second"], "asked once each"
    assert result.usage.calls == 2, "what the killed process paid counts"


async def test_nodes_that_are_done_count_though_their_checkpoint_is_missing(process: Process, tmp_path: Path) -> None:
    """Killed between the last branch's writes and the checkpoint that joins them."""
    process.model.script = lambda messages: say(f"answer {messages[-1]['content']}")
    notes = tmp_path / "notes"
    declare("branches", Nodes(notes))
    plan = Plan(process.runtime).plan
    result = await process.run(plan, REQUEST)
    newest = "SELECT max(checkpoint_id) FROM checkpoints WHERE thread_id = 'wf/run'"
    for left in (2, 1):  # of `end`'s own, then of the branches that it waited for
        await process.runtime.db.run(f"DELETE FROM checkpoints WHERE checkpoint_id = ({newest})")
        again = await process.run(plan, REQUEST)
        assert again.model_copy(update={"checkpoint": ""}) == result.model_copy(update={"checkpoint": ""}), left
        await process.runtime.db.run(f"DELETE FROM checkpoints WHERE checkpoint_id = ({newest})")
    assert sorted(notes.read_text().split()) == ["first", "second"]
    assert len(process.model.requests) == 2
