"""What the commands say of agents with tools of MCP servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.authoring import registry
from holdfast.cli.catalogue import show_agents, show_tools
from holdfast.contracts.profile import Effect
from holdfast.ext.mcp.spec import McpServer
from tests.fixtures.world import World, agent
from tests.integration.mcp.conftest import name, stdio


@pytest.fixture(autouse=True)
def _only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_added", {})


def test_tools_of_a_server_are_listed_with_whose_they_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    server = stdio(tmp_path / "journal", effects={"look": Effect.READ, "lok": Effect.READ})
    spec = agent(World().tool("own"), mcp=(server,), steps=[])
    show_tools(spec.name, as_json=True)
    tools = {tool["name"]: tool for tool in json.loads(capfd.readouterr().out)}
    look, write = tools[f"{server.name}_look"], tools[f"{server.name}_write"]
    assert (look["effect"], look["approval"], look["mcp"], tools["own"]["mcp"]) == ("read", False, True, False)
    assert (write["effect"], write["approval"]) == ("manual", True)
    assert look["arguments"]["properties"]["word"] == {"title": "Word", "type": "string"}

    show_tools(spec.name, as_json=False)
    told = capfd.readouterr().out
    assert f"{server.name}_look  version" in told and f"read · MCP server {server.name}" in told
    assert "the spec names tools that it does not have: lok" in told  # a slip of the pen is seen


def test_a_server_that_does_not_answer_is_one_line_and_hides_nothing_else(capfd: pytest.CaptureFixture[str]):
    server = McpServer(name(), url="http://127.0.0.1:1/mcp")
    spec = agent(World().tool("own"), mcp=(server,), steps=[])
    show_tools(spec.name, as_json=False)
    told = capfd.readouterr().out.splitlines()
    assert sum(f"MCP server {server.name}" in line for line in told) == 1
    assert any("its tools are not known now" in line for line in told) and any("own  version" in line for line in told)

    show_agents(as_json=True)
    (found,) = [each for each in json.loads(capfd.readouterr().out) if each["name"] == spec.name]
    assert found["tools"] == ["own"] and "cannot be reached" in found["mcp"][0]["problem"]
