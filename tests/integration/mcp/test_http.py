"""What HTTP says to a call is what the one table of errors judges, not the library's paraphrase of it."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import httpx2
import pytest

from holdfast.contracts.failures import Failure
from holdfast.ext.mcp.connection import Connection
from holdfast.ext.mcp.failures import ServerDown
from holdfast.ext.mcp.spec import McpServer
from holdfast.reliability.errors import classify
from holdfast.testing.patience import PATIENCE_S
from tests.integration.mcp.conftest import Served, name, served


async def failure(notebook: Served, connection: Connection, tool: str, /, **arguments: Any) -> Failure:
    with pytest.raises(Exception) as caught:
        await notebook.call(connection, tool, **arguments)
    return classify(caught.value)


async def force(notebook: Served, status: int) -> None:
    async with httpx2.AsyncClient(timeout=PATIENCE_S) as client:
        await client.post(notebook.server.url.replace("/mcp", f"/status/{status}"))


@pytest.mark.parametrize(
    ("status", "type", "retry", "maybe_done"),
    [
        (401, "unauthorized", False, False),
        (403, "unauthorized", False, False),
        (429, "rate_limited", True, False),
        (500, "unavailable", True, True),
        (503, "unavailable", True, True),
    ],
)
async def test_a_status_is_judged_as_for_any_service(
    http_notebook: Served, status: int, type: str, retry: bool, maybe_done: bool
):
    connection = http_notebook.connection()
    await connection.tools(20)
    await force(http_notebook, status)
    found = await failure(http_notebook, connection, "write", text="x")
    assert (found.type, found.retry, found.maybe_done) == (type, retry, maybe_done)
    assert found.retry_after == (7 if status == 429 else None)
    assert await http_notebook.call(connection, "write", text="y") == {"written": "y"}
    assert len(http_notebook.calls("write")) == 1


async def test_a_server_that_is_down_was_certainly_not_called_and_is_found_again(http_notebook: Served):
    connection = http_notebook.connection()
    await http_notebook.call(connection, "look", word="a")
    port = int(http_notebook.server.url.split(":")[2].split("/")[0])
    http_notebook.stop()
    version = (await connection.tools(5))[http_notebook.server.tool_name("look")].version
    with pytest.raises(Exception) as caught:
        await connection.call(http_notebook.server.tool_name("look"), version, {"word": "b"}, "k", connect_s=5)
    found = classify(caught.value)
    assert (found.type, found.retry, found.maybe_done) == ("unreachable", True, False)

    http_notebook.start(port)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await connection.call(http_notebook.server.tool_name("look"), version, {"word": "c"}, "k", connect_s=5)
                break
            except Exception as error:  # noqa: BLE001 - it is judged
                assert not classify(error).maybe_done
                await asyncio.sleep(0.1)


async def test_a_connection_that_breaks_in_a_call_leaves_a_doubt(http_notebook: Served):
    connection = http_notebook.connection()
    await connection.tools(20)
    found = await failure(http_notebook, connection, "die")
    assert (found.type, found.retry, found.maybe_done) == ("connection", True, True)


async def test_a_hung_server_is_cut_by_the_callers_limit(http_notebook: Served):
    connection = http_notebook.connection()
    await connection.tools(20)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await http_notebook.call(connection, "block")
    assert http_notebook.process
    http_notebook.process.send_signal(signal.SIGCONT)
    assert await http_notebook.call(connection, "look", word="a") == {"result": "a"}


async def test_a_secret_goes_from_the_environment_to_the_server_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with served(tmp_path, NOTEBOOK_TOKEN="right-token") as make:
        monkeypatch.setenv("A_TOKEN", "Bearer right-token")
        notebook = make(headers_env={"Authorization": "A_TOKEN"})
        connection = notebook.connection()
        await notebook.call(connection, "look", word="a")
        found = await failure(notebook, connection, "complain", text="you sent right-token")
        assert "right-token" not in found.message and "you sent …" in found.message
        assert "right-token" not in repr(notebook.server)
        await connection.close()

        monkeypatch.setenv("A_TOKEN", "Bearer wrong-token")
        other = notebook.connection()
        with pytest.raises(httpx2.HTTPStatusError) as caught:
            await other.tools(20)
        assert classify(caught.value).type == "unauthorized" and "wrong-token" not in classify(caught.value).message
        await other.close()


async def test_nothing_listens():
    connection = Connection(McpServer(name(), url="http://127.0.0.1:1/mcp"))
    with pytest.raises(ServerDown, match="cannot be reached"):
        await connection.tools(5)
    await connection.close()
