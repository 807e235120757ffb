"""A session with a server: what calls get, what they do not wait for, and what is left when a process ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from holdfast.contracts.failures import ToolRefused
from holdfast.dev.stack import ROOT
from holdfast.ext.mcp.failures import ServerDown
from holdfast.ext.mcp.spec import McpServer
from holdfast.reliability.errors import classify
from holdfast.testing.patience import PATIENCE_S
from tests.integration.mcp.conftest import Notebook, name, stdio


async def test_a_call_takes_its_key_along_and_its_structured_result_back(either: Notebook):
    connection = either.connection()
    assert await either.call(connection, "write", text="a") == {"written": "a"}
    assert either.calls("write")[0]["key"] == "key-1"


async def test_what_is_not_text_is_described_in_words(either: Notebook):
    shown = await either.call(either.connection(), "show")
    assert "look:" in shown and "[image, image/png, 5 bytes: cannot be shown]" in shown
    assert "[resource note://1]\na note" in shown and "[resource note://2, audio/wav, 2 bytes" in shown


async def test_a_tool_that_says_it_failed_is_refused_in_its_own_words(either: Notebook):
    with pytest.raises(ToolRefused, match="no such page"):
        await either.call(either.connection(), "complain", text="no such page")


async def test_arguments_are_checked_by_the_servers_schema(notebook: Notebook):
    listed = (await notebook.connection().tools(20))[notebook.server.tool_name("look")]
    assert listed.validate({"word": "a"}) == {"word": "a"}
    for wrong in ({}, {"word": 1}, {"word": "a", "times": "{often}"}):
        with pytest.raises(ValidationError, match=r"required|is not of type"):
            listed.validate(wrong)


async def test_one_session_serves_calls_at_once(either: Notebook):
    connection = either.connection()
    await connection.tools(20)
    begun = time.monotonic()
    await asyncio.gather(*(either.call(connection, "slow", seconds=2) for _ in range(10)))
    assert time.monotonic() - begun < 15
    assert len({call["pid"] for call in either.calls("slow")}) == 1


async def test_a_server_that_dies_in_a_call_leaves_a_doubt_and_is_started_again(notebook: Notebook):
    connection = notebook.connection()
    with pytest.raises(Exception, match="Connection closed") as caught:
        await notebook.call(connection, "die")
    failure = classify(caught.value)
    assert (failure.type, failure.retry, failure.maybe_done) == ("connection", True, True)
    await notebook.call(connection, "look", word="a")
    assert notebook.calls("look")[0]["pid"] != notebook.calls("die")[0]["pid"]


async def test_a_call_to_a_server_that_died_meanwhile_is_made_on_a_new_process(notebook: Notebook):
    connection = notebook.connection()
    await notebook.call(connection, "look", word="a")
    os.kill(notebook.calls("look")[0]["pid"], signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        while connection._opening and not connection._opening.result().ended.is_set():  # pyright: ignore[reportPrivateUsage]
            await asyncio.sleep(0.01)
    await notebook.call(connection, "look", word="b")
    assert len({call["pid"] for call in notebook.calls("look")}) == 2


async def test_a_hung_server_is_cut_by_the_callers_limit_and_replaced(notebook: Notebook):
    connection = notebook.connection()
    await notebook.call(connection, "slow", seconds=0.5)  # by then the list of tools is settled
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await notebook.call(connection, "block")
    with pytest.raises(ServerDown) as caught:  # while it is found out whether it answers anything
        await connection.call(notebook.server.tool_name("look"), "v", {}, "k", connect_s=0.1)
    assert not classify(caught.value).maybe_done
    assert await notebook.call(connection, "look", word="a") == {"result": "a"}
    assert notebook.calls("look")[0]["pid"] != notebook.calls("block")[0]["pid"]


async def test_a_slow_call_that_is_cut_does_not_cost_the_others_their_session(notebook: Notebook):
    connection = notebook.connection()
    await connection.tools(20)
    other = asyncio.create_task(notebook.call(connection, "slow", seconds=2))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await notebook.call(connection, "slow", seconds=60)
    assert await other == {"result": "done"}
    assert len({call["pid"] for call in notebook.calls("slow")}) == 1


async def test_a_tool_that_changed_since_the_decision_is_not_called(either: Notebook):
    connection = either.connection()
    before = (await connection.tools(20))[either.server.tool_name("write")]
    await either.call(connection, "reword", tool="write", description="Burn everything.")
    async with asyncio.timeout(PATIENCE_S):
        while (await connection.tools(20))[either.server.tool_name("write")].description != "Burn everything.":
            await asyncio.sleep(0.02)
    with pytest.raises(ToolRefused, match="has changed"):
        await connection.call(either.server.tool_name("write"), before.version, {"text": "x"}, "k", connect_s=20)
    assert not either.calls("write")


async def test_a_call_decided_without_the_schema_is_checked_by_it_before_it_goes_out(notebook: Notebook):
    connection = notebook.connection()
    with pytest.raises(ToolRefused, match="5 is not of type 'string'"):
        await connection.call(notebook.server.tool_name("write"), "1", {"text": 5}, "k", connect_s=20)
    assert not notebook.calls("write")
    await connection.call(notebook.server.tool_name("write"), "1", {"text": "5"}, "k", connect_s=20)


async def test_a_tool_that_vanished_is_said_to_be_gone(either: Notebook):
    connection = either.connection()
    before = (await connection.tools(20))[either.server.tool_name("write")]
    await either.call(connection, "reword", tool="write", description="")
    async with asyncio.timeout(PATIENCE_S):
        while either.server.tool_name("write") in await connection.tools(20):
            await asyncio.sleep(0.02)
    with pytest.raises(ToolRefused, match="any more"):
        await connection.call(either.server.tool_name("write"), before.version, {"text": "x"}, "k", connect_s=20)


async def test_a_server_that_cannot_be_started_was_certainly_not_called():
    from holdfast.ext.mcp.connection import Connection

    connection = Connection(McpServer(name(), command=("no-such-command",)))
    for _ in range(2):  # also at once again, when nothing is tried
        with pytest.raises(ServerDown) as caught:
            await connection.tools(20)
        failure = classify(caught.value)
        assert (failure.type, failure.retry, failure.maybe_done) == ("unreachable", True, False)
    await connection.close()


async def test_only_variables_that_are_named_reach_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_SECRET", "for nobody")
    monkeypatch.setenv("A_TOKEN", "for the server")
    notebook = Notebook(tmp_path / "journal", stdio(tmp_path / "journal", env=("A_TOKEN",)))
    connection = notebook.connection()
    assert await notebook.call(connection, "environment", name="A_TOKEN") == {"result": "for the server"}
    assert await notebook.call(connection, "environment", name="A_SECRET") == {"result": "not there"}
    await connection.close()
    monkeypatch.delenv("A_TOKEN")
    with pytest.raises(ServerDown, match="A_TOKEN, which is not set"):
        await notebook.connection().tools(20)


async def test_closing_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NOTEBOOK_DEAF", "1")
    notebook = Notebook(tmp_path / "journal", stdio(tmp_path / "journal", env=("NOTEBOOK_DEAF",)))
    connection = notebook.connection()
    await notebook.call(connection, "look", word="a")
    assert notebook.processes()
    await connection.close()
    await notebook.gone()


HOLDER = """
import asyncio, sys
from pathlib import Path
from holdfast.ext.mcp.connection import Connection
from tests.integration.mcp.conftest import stdio

async def main():
    await Connection(stdio(Path(sys.argv[1]), env=("NOTEBOOK_DEAF",))).tools(20)
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a process of its parent's death on Linux only")
async def test_a_server_dies_with_its_worker_also_by_sigkill_and_behind_a_launcher(notebook: Notebook):
    # Deaf to the end of its input, and frozen: only its death by signal ends it.
    environment = {**os.environ, "NOTEBOOK_DEAF": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(notebook.journal)]
    worker = await asyncio.create_subprocess_exec(*command, env=environment, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    assert worker.stdout is not None
    assert await worker.stdout.readline() == b"ready\n"
    servers = [each for each in notebook.processes() if each.pid != worker.pid]
    assert len(servers) == 2  # the server and the one that minds it
    next(each for each in servers if each.ppid() != worker.pid).suspend()
    worker.kill()
    await worker.wait()
    await notebook.gone()
