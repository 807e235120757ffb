"""Graphs that run over our saver: what was done is not done again, and any checkpoint can be gone on from."""

import asyncio
import multiprocessing
import operator
import os
import signal
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command, interrupt

from holdfast.reasoning.checkpointer import WRITES_A_STATEMENT, Checkpoints
from holdfast.state.database import Database
from holdfast.state.opening import open_database


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


@pytest.fixture
def saver(db: Database) -> Checkpoints:
    return Checkpoints(db)


def two_nodes(saver: Checkpoints, first: Any, second: Any) -> CompiledStateGraph:
    graph = StateGraph(State)
    graph.add_node("first", first)
    graph.add_node("second", second)
    graph.add_edge(START, "first")
    graph.add_edge("first", "second")
    graph.add_edge("second", END)
    return graph.compile(checkpointer=saver)


def says(*words: str) -> Any:
    async def node(_: State) -> State:
        return {"log": list(words)}

    return node


def thread(name: str = "t", turn: int | None = None, **more: Any) -> Any:
    metadata = {} if turn is None else {"turn": turn}
    return {"configurable": {"thread_id": name, **more}, "metadata": metadata}


async def listed(saver: Checkpoints, config: Any, **how: Any) -> list[str]:
    return [checkpoint_id(c.config) async for c in saver.alist(config, **how)]


def checkpoint_id(config: Any) -> str:
    return config["configurable"]["checkpoint_id"]


def die(_: State) -> State:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def _run_until_killed(url: str, calls: Path) -> None:
    def model(_: State) -> State:
        with calls.open("a") as out:
            out.write("call\n")
        return {"log": ["model"]}

    async def run() -> None:
        graph = two_nodes(Checkpoints(await open_database(url)), model, die)
        await graph.ainvoke({"log": ["input"]}, thread(), durability="sync")

    asyncio.run(run())


async def test_a_killed_process_resumes_at_the_second_node(store_url: str, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    process = multiprocessing.get_context("spawn").Process(target=_run_until_killed, args=(store_url, calls))
    process.start()
    await asyncio.to_thread(process.join, 60)
    assert process.exitcode == -signal.SIGKILL and calls.read_text() == "call\n"

    db = await open_database(store_url)

    async def paid_again(_: State) -> State:
        raise AssertionError("the model was called again")

    graph = two_nodes(Checkpoints(db), paid_again, says("check"))
    assert (await graph.aget_state(thread())).next == ("second",)
    assert await graph.ainvoke(None, thread(), durability="sync") == {"log": ["input", "model", "check"]}
    await db.close()


async def test_a_turn_is_found_by_its_metadata(saver: Checkpoints, db: Database) -> None:
    """The recipe of a turn that may have been run before: find its newest checkpoint, finished or not."""
    graph = two_nodes(saver, says("model"), says("check"))
    for turn in (1, 2, 11):
        await graph.ainvoke({"log": [f"turn {turn}"]}, thread(turn=turn), durability="sync")
    await graph.ainvoke({"log": ["other thread"]}, thread("u", turn=2), durability="sync")

    where = thread(checkpoint_ns="")
    hits = [c async for c in saver.alist(where, filter={"turn": 2}, limit=1)]
    assert hits[0].checkpoint["channel_values"]["log"] == ["turn 1", "model", "check", "turn 2", "model", "check"]
    assert not (await graph.aget_state(hits[0].config)).next
    assert await listed(saver, where, filter={"turn": 3}) == []
    assert await listed(saver, where, filter={"turn": "2"}) == []
    everything = await listed(saver, where)
    assert everything == sorted(everything, reverse=True)
    per_turn = len(everything) // 3
    assert await listed(saver, where, filter={"turn": 1}) == everything[-per_turn:]
    assert await listed(saver, where, filter={"turn": 2, "step": 10**6}) == []
    assert await listed(saver, where, before=hits[0].config, limit=2) == everything[per_turn + 1 : per_turn + 3]
    assert await db.one("SELECT count(*) FROM checkpoints WHERE thread_id = 't' AND turn = '2'") == (per_turn,)


async def test_a_thread_can_be_forked_from_an_older_checkpoint(saver: Checkpoints) -> None:
    """What a Temporal Reset does: turn 2 runs again from the end of turn 1; both futures stay readable."""
    graph = two_nodes(saver, says("model"), says("check"))
    await graph.ainvoke({"log": ["one"]}, thread(turn=1), durability="sync")
    base = checkpoint_id((await graph.aget_state(thread())).config)
    await graph.ainvoke({"log": ["two"]}, thread(turn=2), durability="sync")
    old = checkpoint_id((await graph.aget_state(thread())).config)

    await graph.ainvoke({"log": ["two again"]}, thread(turn=2, checkpoint_id=base), durability="sync")
    latest = await graph.aget_state(thread())
    assert latest.values["log"] == ["one", "model", "check", "two again", "model", "check"]
    replaced = await graph.aget_state(thread(checkpoint_id=old))
    assert replaced.values["log"] == ["one", "model", "check", "two", "model", "check"]


async def test_a_failing_branch_does_not_repeat_the_finished_one(saver: Checkpoints, db: Database) -> None:
    runs: list[str] = []
    finished = asyncio.Event()

    async def good(state: State) -> State:
        runs.append("good")
        finished.set()
        return {"log": ["good"]}

    async def bad(state: State) -> State:
        runs.append("bad")
        await finished.wait()
        while not await db.one("SELECT 1 FROM checkpoint_writes WHERE channel = 'log'"):
            pass
        if runs.count("bad") == 1:
            raise ConnectionError("reset")
        return {"log": ["bad"]}

    graph = StateGraph(State)
    for name, node in (("good", good), ("bad", bad)):
        graph.add_node(name, node)
        graph.add_edge(START, name)
        graph.add_edge(name, END)
    app = graph.compile(checkpointer=saver)
    with pytest.raises(ConnectionError):
        await app.ainvoke({"log": ["input"]}, thread(), durability="sync")
    result = await app.ainvoke(None, thread(), durability="sync")
    assert sorted(result["log"][1:]) == ["bad", "good"]
    assert runs.count("good") == 1 and runs.count("bad") == 2


async def test_an_interrupt_waits_in_the_store_and_is_resumed_by_another_client(store_url: str) -> None:
    asked: list[str] = []

    async def ask(_: State) -> State:
        asked.append("asked")
        return {"log": [interrupt("may I?")]}

    db = await open_database(store_url)
    await two_nodes(Checkpoints(db), says("before"), ask).ainvoke({"log": []}, thread(), durability="sync")
    await db.close()

    db = await open_database(store_url)
    graph = two_nodes(Checkpoints(db), says("before"), ask)
    waiting = await graph.aget_state(thread())
    assert [i.value for i in waiting.interrupts] == ["may I?"]
    result = await graph.ainvoke(Command(resume="yes"), thread(), durability="sync")
    assert result["log"] == ["before", "yes"] and len(asked) == 2
    await db.close()


async def test_writes_of_a_task_are_kept_in_order_and_whole(saver: Checkpoints) -> None:
    config = await saver.aput(thread(checkpoint_ns=""), empty_checkpoint(), {"step": 1}, {})
    count = 2 * WRITES_A_STATEMENT + 1
    await saver.aput_writes(config, [("log", n) for n in range(count)], "task-b", "~path-1")
    await saver.aput_writes(config, [("log", "x")], "task-a", "~path-2")
    await saver.aput_writes(config, [("log", "Z")], "task-c", "~Path-3")
    found = await saver.aget_tuple(config)
    assert found is not None and found.pending_writes is not None
    assert found.pending_writes == [
        ("task-c", "log", "Z"),
        *(("task-b", "log", n) for n in range(count)),
        ("task-a", "log", "x"),
    ]
    # A task that runs twice keeps its first writes; of an error or an interrupt the last counts.
    await saver.aput_writes(config, [("log", "second time")], "task-a", "~path-2")
    for error in ("first", "last"):
        await saver.aput_writes(config, [("__error__", error)], "task-d", "~path-4")
    found = await saver.aget_tuple(config)
    assert found is not None and found.pending_writes is not None
    assert found.pending_writes[-2:] == [("task-a", "log", "x"), ("task-d", "__error__", "last")]


async def test_threads_at_once_do_not_mix(saver: Checkpoints) -> None:
    async def echo(state: State) -> State:
        return {"log": [f"seen {state.get('log', [])[0]}"]}

    graph = two_nodes(saver, echo, echo)
    names = [f"t{n}" for n in range(20)]
    results = await asyncio.gather(*(graph.ainvoke({"log": [n]}, thread(n), durability="sync") for n in names))
    assert [r["log"] for r in results] == [[n, f"seen {n}", f"seen {n}"] for n in names]


async def test_deleting_a_thread_leaves_the_others(saver: Checkpoints, db: Database) -> None:
    graph = two_nodes(saver, says("model"), says("check"))
    for name in ("t", "u"):
        await graph.ainvoke({"log": []}, thread(name), durability="sync")
    await saver.adelete_thread("t")
    assert await saver.aget_tuple(thread("t")) is None
    assert await saver.aget_tuple(thread("u")) is not None
    assert await db.all("SELECT DISTINCT thread_id FROM checkpoint_writes") == [("u",)]


async def test_state_of_any_text_comes_back(saver: Checkpoints) -> None:
    words = ["Zoë \u0000 \U0001f600", "50% ?", "'"]
    graph = two_nodes(saver, says(*words), says())
    await graph.ainvoke({"log": []}, thread(turn=1), durability="sync")
    assert (await graph.aget_state(thread())).values["log"] == words


async def test_the_newest_checkpoint_is_the_one_written_last(saver: Checkpoints) -> None:
    ids = []
    for step in range(50):
        checkpoint = {**empty_checkpoint(), "id": str(uuid6(clock_seq=step))}
        config = await saver.aput(thread(checkpoint_ns=""), checkpoint, {"step": step}, {})  # type: ignore[arg-type]
        ids.append(checkpoint_id(config))
        found = await saver.aget_tuple(thread())
        assert found is not None and found.checkpoint["id"] == ids[-1]
    assert await listed(saver, thread()) == ids[::-1]


def test_a_synchronous_call_says_what_to_use(sqlite_url: str) -> None:
    async def build() -> CompiledStateGraph:
        return two_nodes(Checkpoints(await open_database(sqlite_url)), says(), says())

    with pytest.raises(NotImplementedError, match="call the graph with ainvoke"):
        asyncio.run(build()).invoke({"log": []}, thread())
