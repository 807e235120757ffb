"""Agents with tools of MCP servers: two that we did not write, killed in the middle of a call, and our notebook."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import sqlite3
import struct
import subprocess
import termios
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from holdfast.contracts.profile import Effect, StepSpec
from holdfast.contracts.run import Phase, RunOutcome
from holdfast.ext.mcp.spec import McpServer, McpTool
from holdfast.testing.model import call, say, sequence, turn
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, until
from tests.fixtures.world import World, agent
from tests.integration.mcp.conftest import Notebook, name, stdio

# In an environment of their own: they were written for an older `mcp`.
FOREIGN = ("uv", "run", "--no-project", "--isolated", "--quiet", "--with", "mcp<2", "--with")
PASSED_ON = tuple(each for each in os.environ if each.startswith(("UV_", "SSL_", "HTTP", "http", "NO_PROXY")))


@cache
def foreign(package: str) -> tuple[str, ...]:
    """The command of a server from the package index; skips when there is neither uv nor an index."""
    if shutil.which("uv") is None:
        pytest.skip("needs uv, to run a server that pins another version of mcp")
    command = (*FOREIGN, package, package)
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode:
        pytest.skip(f"{package} cannot be had here: {done.stderr.strip()[-300:]}")
    return command


def process_of(package: str) -> psutil.Process:
    """The server itself, behind the launchers that our worker started."""
    of_ours = psutil.Process().children(recursive=True)
    found = [each for each in of_ours if package in " ".join(each.cmdline()) and not each.children()]
    assert len(found) == 1, found
    return found[0]


async def until_sent(server: psutil.Process) -> None:
    """Waits until a frozen server has a call in its input that it has not read."""
    pipe = os.open(f"/proc/{server.pid}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0] == 0:
                await asyncio.sleep(0.01)
    finally:
        os.close(pipe)


def answers(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "tool"]


async def test_a_read_of_a_server_killed_in_the_call_is_made_again_by_a_new_process(lite: Stage) -> None:
    effects = {"get_current_time": Effect.READ, "convert_time": McpTool(Effect.READ, timeout=20)}
    time = McpServer(name(), command=foreign("mcp-server-time"), env=PASSED_ON, effects=effects)
    spec = agent(mcp=(time,), steps=[StepSpec(name="look", tools=[f"{time.name}_convert_time"])])
    convert = {"source_timezone": "Europe/Rome", "time": "12:00", "target_timezone": "Asia/Tokyo"}
    frozen: list[psutil.Process] = []

    def script(messages: list[dict[str, Any]]) -> dict[str, Any]:
        if turn(messages) == 1:
            return call((f"{time.name}_get_current_time", {"timezone": "Europe/Rome"}))
        if turn(messages) == 2:
            frozen.append(process_of("mcp-server-time"))
            frozen[0].suspend()
            return call((f"{time.name}_convert_time", convert))
        return say(answers(messages)[-1])

    lite.model.script = script
    async with lite.worker():
        handle = await lite.start(spec)
        async with asyncio.timeout(PATIENCE_S):
            while not frozen:
                await asyncio.sleep(0.02)
        await until_sent(frozen[0])
        frozen[0].kill()
        result = await handle.result()
        assert process_of("mcp-server-time").pid != frozen[0].pid
    assert result.outcome is RunOutcome.COMPLETED
    assert "Asia/Tokyo" in result.summary and "time_difference" in result.summary
    assert result.failures == 1


async def test_an_effect_at_a_server_killed_in_the_call_goes_to_a_person(lite: Stage, tmp_path: Path) -> None:
    file = tmp_path / "ward.db"
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE beds (patient TEXT)")
    command = (*foreign("mcp-server-sqlite"), "--db-path", str(file))
    effects = {"read_query": Effect.READ, "write_query": McpTool(Effect.MANUAL, timeout=20)}
    ward = McpServer(name(), command=command, env=PASSED_ON, effects=effects, only=("read_query", "write_query"))
    write = f"{ward.name}_write_query"
    spec = agent(mcp=(ward,), steps=[StepSpec(name="book", tools=[write], role="nurse")])
    frozen: list[psutil.Process] = []
    insert = call((write, {"query": "INSERT INTO beds VALUES ('pat-1')"}))

    def script(messages: list[dict[str, Any]]) -> dict[str, Any]:
        if turn(messages) == 1:
            return call((f"{ward.name}_read_query", {"query": "SELECT * FROM beds"}))
        if turn(messages) == 2:
            frozen.append(process_of(str(file)))
            frozen[0].suspend()
            return insert
        return {3: insert, 4: say("could not be sure"), 5: insert}.get(turn(messages), say("booked"))

    def booked() -> list[tuple[str]]:
        with sqlite3.connect(file) as db:
            return db.execute("SELECT patient FROM beds").fetchall()

    lite.model.script = script
    async with lite.worker():
        handle = await lite.start(spec)
        async with asyncio.timeout(PATIENCE_S):
            while not frozen:
                await asyncio.sleep(0.02)
        await until_sent(frozen[0])
        frozen[0].kill()
        (asked,) = (await until(handle, lambda s: s.phase is Phase.WAITING_HUMAN)).approvals
        assert (asked.kind, asked.subject, asked.role) == ("outcome", write, "nurse")
        # The model tried once more, under a new key, and was refused.
        assert "is unknown, and a person has to settle it first" in answers(lite.model.requests[-1][1])[-1]
        assert booked() == []
        finding = {"approval_id": asked.id, "verdict": "did_not", "approver": "n.smith", "comment": "no such row"}
        await handle.signal("decide", finding)
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert booked() == [("pat-1",)]


async def test_an_effect_that_happened_before_the_server_died_is_not_made_twice(lite: Stage, tmp_path: Path) -> None:
    notebook = Notebook(tmp_path / "journal", stdio(tmp_path / "journal", effects={"die": Effect.MANUAL}))
    die = notebook.server.tool_name("die")
    spec = agent(mcp=(notebook.server,), steps=[StepSpec(name="do", tools=[die], critical=False, role="nurse")])
    lite.model.script = sequence(call((die, {})), say("could not be sure"))
    async with lite.worker():
        result = await (await lite.start(spec)).result()
    assert result.outcome is RunOutcome.PARTIAL
    assert [call["key"] for call in notebook.calls("die")] == [f"{result.key_base}/1"]


async def test_an_idempotent_call_is_made_again_under_its_key(lite: Stage, tmp_path: Path) -> None:
    effects = {"die": McpTool(Effect.IDEMPOTENT, timeout=60, retries=1)}
    notebook = Notebook(tmp_path / "journal", stdio(tmp_path / "journal", effects=effects))
    die = notebook.server.tool_name("die")
    lite.model.script = sequence(call((die, {})), say("it keeps dying"))
    async with lite.worker():
        await (await lite.start(agent(mcp=(notebook.server,), steps=[]))).result()
    assert len({call["pid"] for call in notebook.calls("die")}) == 2
    assert len({call["key"] for call in notebook.calls("die")}) == 1


async def test_a_tool_that_nobody_named_waits_for_a_yes(lite: Stage, tmp_path: Path) -> None:
    notebook = Notebook(tmp_path / "journal", stdio(tmp_path / "journal"))
    write = notebook.server.tool_name("write")
    lite.model.script = sequence(call((write, {"text": "a"})), say("written"))
    async with lite.worker():
        handle = await lite.start(agent(mcp=(notebook.server,), steps=[StepSpec(name="do", tools=[write])]))
        (asked,) = (await until(handle, lambda s: s.phase is Phase.WAITING_HUMAN)).approvals
        assert (asked.subject, asked.arguments) == (write, {"text": "a"})
        assert not notebook.calls("write")
        await handle.signal("decide", {"approval_id": asked.id, "verdict": "approve", "approver": "n.smith"})
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
    assert len(notebook.calls("write")) == 1


async def test_arguments_that_do_not_fit_are_told_to_the_model_and_nothing_is_decided(
    lite: Stage, tmp_path: Path
) -> None:
    notebook = Notebook(tmp_path / "journal", stdio(tmp_path / "journal", effects={"look": Effect.READ}))
    look = notebook.server.tool_name("look")
    lite.model.script = sequence(call((look, {"word": 5})), call((look, {"word": "five"})), say("five"))
    async with lite.worker():
        result = await (await lite.start(agent(mcp=(notebook.server,), steps=[]))).result()
    assert "word: 5 is not of type 'string'" in answers(lite.model.requests[1][1])[0]
    assert (result.calls, len(notebook.calls("look"))) == (1, 1)


async def test_a_server_that_is_down_at_the_start_makes_the_run_wait(lite: Stage, tmp_path: Path) -> None:
    switch = tmp_path / "up"
    command = ("sh", "-c", f'test -e {switch} && exec "$0" "$@"')
    server = stdio(tmp_path / "journal", effects={"look": Effect.READ})
    server = McpServer(name(), command=(*command, *server.command), env=server.env, effects=server.effects)
    notebook = Notebook(tmp_path / "journal", server)
    lite.model.script = sequence(call((server.tool_name("look"), {"word": "a"})), say("looked"))
    async with lite.worker():
        handle = await lite.start(agent(mcp=(server,), steps=[]))
        parked = await until(handle, lambda s: s.phase is Phase.PARKED)
        assert f"MCP server {server.name} cannot be reached" in parked.notes[-1]
        assert not lite.model.requests
        switch.touch()
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
    assert len(notebook.calls("look")) == 1


async def test_a_server_that_a_new_worker_cannot_reach_is_withdrawn_and_the_rest_goes_on(
    lite: Stage, tmp_path: Path
) -> None:
    switch = tmp_path / "up"
    switch.touch()
    command = ("sh", "-c", f'test -e {switch} && exec "$0" "$@"')
    server = stdio(tmp_path / "journal", effects={"look": Effect.READ})
    server = McpServer(name(), command=(*command, *server.command), env=server.env, effects=server.effects)

    def script(messages: list[dict[str, Any]]) -> dict[str, Any]:
        if turn(messages) == 1:
            return call((server.tool_name("look"), {"word": "a"}))
        if turn(messages) == 2:
            switch.unlink()
            lite.runtime.mcp._connections.clear()  # pyright: ignore[reportPrivateUsage]  # a new worker knows no server
            return call(("note", {}))
        if turn(messages) == 3:
            switch.touch()
            return call(("note", {"n": 2}))
        return say("went on without")

    lite.model.script = script
    spec = agent(World().tool("note"), mcp=(server,), steps=[])
    async with lite.worker():
        old = lite.runtime.mcp.connection(server)
        result = await (await lite.start(spec)).result()
        await old.close()
    assert result.outcome is RunOutcome.COMPLETED
    told = [m["content"] for m in lite.model.requests[-1][1] if m["role"] == "user"]
    assert f"Not available for now: every tool of server {server.name}" in told[1]
    assert any(f"every tool of server {server.name} is withdrawn" in note for note in result.notes)


async def test_a_run_does_not_end_without_a_step_whose_server_is_gone(lite: Stage, tmp_path: Path) -> None:
    switch = tmp_path / "up"
    switch.touch()
    command = ("sh", "-c", f'test -e {switch} && exec "$0" "$@"')
    server = stdio(tmp_path / "journal", effects={"look": Effect.READ})
    server = McpServer(name(), command=(*command, *server.command), env=server.env, effects=server.effects)
    look = server.tool_name("look")

    def script(messages: list[dict[str, Any]]) -> dict[str, Any]:
        if turn(messages) == 1:
            switch.unlink()
            lite.runtime.mcp._connections.clear()  # pyright: ignore[reportPrivateUsage]  # a new worker knows no server
            return call(("note", {}))
        if turn(messages) == 3 and look in lite.model.offered[-1]:
            return call((look, {"word": "a"}))
        return say("that is all")

    lite.model.script = script
    steps = [StepSpec(name="look", tools=[look]), StepSpec(name="note", tools=["note"])]
    async with lite.worker():
        old = lite.runtime.mcp.connection(server)
        handle = await lite.start(agent(World().tool("note"), mcp=(server,), steps=steps))
        parked = await until(handle, lambda s: s.phase is Phase.PARKED)
        assert f"MCP server {server.name} cannot be reached" in parked.line
        assert len(lite.model.requests) == 2, "waiting asks no model"
        switch.touch()
        result = await handle.result()
        await old.close()
    assert (result.outcome, result.turns) == (RunOutcome.COMPLETED, 4)
