"""The platform as an MCP server, asked by the real client: over stdio and over HTTP, against a real stack."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from holdfast.dev.stack import ROOT, Stack
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.checkout import Checkout
from tests.fixtures.stack import Cli

TOKEN = "a-long-and-random-token"


@asynccontextmanager
async def over_stdio(stack: Stack, *options: str, **environment: str) -> AsyncIterator[Client]:
    arguments = [str(ROOT / "starter.py"), "mcp", *options]
    parameters = StdioServerParameters(
        command=sys.executable, args=arguments, env={**stack.environment, **environment}, cwd=ROOT
    )
    async with Client(parameters, cache=None) as client:
        yield client


@asynccontextmanager
async def over_http(cli: Cli, *options: str) -> AsyncIterator[str]:
    """The address of a server with a token."""
    serving = cli.start("mcp", "--http", "0", *options, HOLDFAST_MCP_TOKEN=TOKEN)
    try:
        assert serving.stdout is not None
        line = await asyncio.to_thread(serving.stdout.readline)
        assert line.startswith("MCP server at http://127.0.0.1:"), line
        yield line.split()[-1]
    finally:
        serving.terminate()
        assert await asyncio.to_thread(serving.wait, 15) in (0, -15), serving.returncode


@asynccontextmanager
async def a_client(url: str, token: str) -> AsyncIterator[Client]:
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=PATIENCE_S) as http,
        Client(streamable_http_client(url, http_client=http), cache=None) as client,
    ):
        yield client


async def ask(client: Client, tool: str, /, **arguments: Any) -> dict[str, Any]:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert result.structured_content is not None
    return result.structured_content


async def refused(client: Client, tool: str, /, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    return result.content[0].text  # pyright: ignore[reportAttributeAccessIssue]


async def until(client: Client, run: str, tool: str, holds: Any) -> Mapping[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while not holds(now := await ask(client, tool, run=run)):
            await asyncio.sleep(0.2)
        return now


async def test_a_run_from_start_to_result_with_a_decision_in_the_name_that_was_given(stack: Stack) -> None:
    key = f"mcp-{uuid.uuid4().hex[:8]}"
    async with over_stdio(stack, "--decide", "--by", "dr.lee") as client:
        begin = {"agent": "discharge", "input": {"patient_id": "pat-1"}, "request_key": key}
        started = await ask(client, "start_run", **begin)
        again = await ask(client, "start_run", **begin)
        assert (started["new"], again["new"], started["run"]) == (True, False, again["run"])
        run = started["run"]
        assert "is still running" in await refused(client, "result", run=run)

        async def settle() -> None:
            while True:
                for each in (await ask(client, "approvals", run=run))["waiting"]:
                    approval = each["approval"]
                    answer = {"run": run, "approval_id": approval["id"], "verdict": "approve"}
                    assert "digest" in await refused(client, "decide", **answer, digest="0" * 16)
                    await ask(client, "decide", **answer, digest=approval["digest"])
                await asyncio.sleep(0.3)

        settling = asyncio.create_task(settle())
        await until(client, run, "status", lambda status: status["phase"] == "ended" or settling.done())
        settling.cancel()
        result = await ask(client, "result", run=run)
        assert result["outcome"] == "completed"
        assert {each["decision"]["approver"] for each in result["decisions"]} == {"dr.lee"}


async def test_nobody_decides_unless_the_server_was_told_to_let_them(stack: Stack, cli: Cli) -> None:
    async with over_stdio(stack) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"start_run", "status", "result", "approvals"}
        assert "Unknown tool" in await refused(client, "decide", run="r")
        assert "discharge" in (tools["start_run"].description or "") and "patient_id" in tools["start_run"].description  # pyright: ignore[reportOperatorIssue]
    done = cli("mcp", "--decide")
    assert done.returncode == 2 and "--decide needs --by NAME" in done.stderr


async def test_errors_are_words_that_a_model_can_act_on(stack: Stack) -> None:
    async with over_stdio(stack, "--decide", "--by", "dr.lee") as client:
        start = {"agent": "discharge", "input": {"patient_id": "pat-1"}, "request_key": "k"}
        unknown = await refused(client, "start_run", **{**start, "agent": "nobody"})
        assert "no agent named 'nobody'; there are: " in unknown and "discharge" in unknown
        assert "patient_id" in await refused(client, "start_run", **{**start, "input": {}})
        assert "request_key" in await refused(client, "start_run", **{**start, "request_key": ""})
        assert "no run 'discharge-none'" in await refused(client, "status", run="discharge-none")
        decision = {"run": "discharge-none", "approval_id": "a1", "digest": "", "verdict": "reject"}
        assert "digest" in await refused(client, "decide", **decision)  # an answer to whatever is asked is none
        assert "needs a comment" in await refused(client, "decide", **{**decision, "digest": "d"})


async def test_without_a_server_behind_it_every_call_says_so(stack: Stack) -> None:
    async with over_stdio(stack, TEMPORAL_ADDRESS="127.0.0.1:1") as client:
        assert "127.0.0.1:1" in await refused(client, "approvals")


async def test_over_http_only_the_token_opens(cli: Cli) -> None:
    async with over_http(cli) as url:
        async with httpx2.AsyncClient(timeout=PATIENCE_S) as http:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
                assert (await http.post(url, headers=headers, json={})).status_code == 401
        async with a_client(url, TOKEN) as client:
            assert "no run" in await refused(client, "status", run="discharge-none")
            assert (await ask(client, "approvals"))["waiting"] is not None


@pytest.mark.parametrize("token", ["", None])
def test_http_without_a_token_is_refused(cli: Cli, token: str | None) -> None:
    done = cli("mcp", "--http", "0", **({} if token is None else {"HOLDFAST_MCP_TOKEN": token}))
    assert done.returncode == 2 and "--http needs HOLDFAST_MCP_TOKEN" in done.stderr


def test_nothing_but_the_protocol_is_on_stdout(cli: Cli) -> None:
    done = cli("mcp", stdin="no JSON at all\n")
    assert done.returncode == 0
    assert all(line.startswith('{"jsonrpc"') for line in done.stdout.splitlines())


def test_what_an_agent_prints_at_its_import_is_not_on_stdout(checkout: Checkout) -> None:
    with (checkout.root / "agents" / "triage" / "spec.py").open("a") as spec:
        spec.write("\nprint('hello from a spec')\n")
    done = checkout("starter.py", "mcp")
    assert (done.returncode, done.stdout, "hello from a spec" in done.stderr) == (0, "", True), done


def test_a_port_that_is_taken_is_one_line(cli: Cli, stack: Stack) -> None:
    port = stack.environment["TEMPORAL_ADDRESS"].rpartition(":")[2]
    done = cli("mcp", "--http", port, HOLDFAST_MCP_TOKEN=TOKEN)
    assert done.returncode == 2 and "cannot listen at 127.0.0.1" in done.stderr
