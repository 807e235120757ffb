"""What an agent says of an MCP server, before anybody has asked it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.authoring import registry
from holdfast.authoring.agent import AgentSpec
from holdfast.contracts.profile import Effect, StepSpec
from holdfast.ext.mcp.spec import McpServer, McpTool
from tests.fixtures.world import Anything, World, agent

WHERE: dict[str, Any] = {"command": ("server",)}


@pytest.mark.parametrize(
    ("declared", "complaint"),
    [
        ({}, "either a command or a url"),
        ({**WHERE, "url": "https://h/mcp"}, "either a command or a url"),
        ({"command": "server"}, "tuple of words"),
        ({"url": "ftp://h/mcp"}, "http:// or https://"),
        ({"url": "https://user:word@h/mcp"}, "no credentials in the url"),
        ({**WHERE, "headers_env": {"Authorization": "T"}}, "headers_env goes with a url"),
        ({"url": "https://h/mcp", "env": ("T",)}, "env with a command"),
        ({**WHERE, "effects": {"a": Effect.READ}, "only": ("b",)}, "leaves out"),
        ({**WHERE, "effects": {"a": Effect.PROBE}}, "probe"),
    ],
)
def test_a_declaration_that_could_not_work_is_refused_at_import(declared: dict[str, Any], complaint: str):
    with pytest.raises(TypeError, match=complaint):
        McpServer("crm", **declared)


def test_a_tool_that_nobody_named_runs_once_at_most_and_only_after_a_yes():
    server = McpServer("crm", **WHERE, effects={"find": Effect.READ, "close": McpTool(Effect.IDEMPOTENT, timeout=3)})
    spec = agent(mcp=(server,))

    policies = {name: tool.policy for name in ("crm_find", "crm_close", "crm_odd") if (tool := spec.tool(name))}

    assert (policies["crm_odd"].effect, policies["crm_odd"].approval) == (Effect.MANUAL, True)
    assert (policies["crm_find"].effect, policies["crm_find"].approval) == (Effect.READ, False)
    assert policies["crm_close"].timeout_s == 3
    assert {policy.service for policy in policies.values()} == {"crm"}


def test_a_tool_that_is_left_out_does_not_exist():
    spec = agent(mcp=(McpServer("crm", **WHERE, only=("find",)),))
    assert spec.tool("crm_find") and not spec.tool("crm_other") and not spec.tool("find")


@given(st.text(min_size=1, max_size=150))
def test_every_name_fits_what_models_take(remote: str):
    server = McpServer("a-server_of-24-characters"[:24], **WHERE, effects={remote: Effect.READ})
    name = server.tool_name(remote)
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name)
    assert server.rule(name).effect is Effect.READ and server.may_have(name)


def test_names_that_are_cut_stay_apart():
    server = McpServer("crm", **WHERE)
    assert len({server.tool_name(each) for each in ("a.b", "a/b", "a b", "x" * 70 + "1", "x" * 70 + "2")}) == 5


def test_a_name_says_whose_tool_it_is():
    one, two = McpServer("crm", **WHERE), McpServer("crm_eu", **WHERE)
    with pytest.raises(TypeError, match="one name begins the other"):
        agent(mcp=(one, two))
    with pytest.raises(TypeError, match="has the prefix of MCP server crm"):
        agent(World().tool("crm_find"), mcp=(one,))


def test_a_step_may_name_a_tool_of_a_server():
    server = McpServer("crm", **WHERE, only=("find",))
    agent(mcp=(server,), steps=[StepSpec(name="look", tools=["crm_find"])])
    with pytest.raises(TypeError, match="unknown tools"):
        agent(mcp=(server,), steps=[StepSpec(name="look", tools=["crm_lose"])])


def test_two_agents_may_not_mean_different_servers_by_one_name(monkeypatch: pytest.MonkeyPatch):
    def spec(name: str, command: str) -> AgentSpec:
        mcp = (McpServer("twice", command=(command,)),)
        return AgentSpec(name=name, description="", instructions="", input=Anything, tools=(), mcp=mcp)

    monkeypatch.setattr(registry, "_added", {"a": spec("a", "one"), "b": spec("b", "two")})
    registry.services.cache_clear()
    with pytest.raises(registry.BrokenAgent, match="declares MCP server twice differently"):
        registry.service("twice")
