"""What docs/how-to/mcp.md shows is so."""

import json
import re
from dataclasses import fields

from holdfast.authoring.agent import AgentSpec
from holdfast.cli.mcp_server import make_server
from holdfast.contracts.profile import Effect
from holdfast.ext.mcp.connection import KEY_META
from holdfast.ext.mcp.session import CHECK_S
from holdfast.ext.mcp.spec import McpServer
from tests.system.docs.test_docs import ROOT, rows

PAGE = (ROOT / "docs/how-to/mcp.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return found


def test_the_spec_that_is_shown_is_one_and_means_what_is_said():
    names: dict[str, AgentSpec] = {}
    exec(compile(block("python"), "docs/how-to/mcp.md", "exec"), names)
    spec = names["SPEC"]
    found = {name: spec.tool(name) for name in ("time_convert_time", "time_other", "crm_add_note", "crm_other")}
    assert {name: (tool.effect, tool.approval) for name, tool in found.items() if tool} == {
        "time_convert_time": (Effect.READ, False),
        "time_other": (Effect.MANUAL, True),
        "crm_add_note": (Effect.MANUAL, True),
    }


def test_the_tables_are_the_code():
    told = [name.strip("`") for name, _ in rows(PAGE, "| of a server")]
    assert told == [field.name for field in fields(McpServer)]
    offered = {name.strip("`") for name, _ in rows(PAGE, "| tool |")}
    assert offered == set(make_server("x", decide=True)._tool_manager._tools)  # pyright: ignore[reportPrivateUsage]
    assert f"`{KEY_META}`" in PAGE and f"in {CHECK_S:g} s" in PAGE


def test_the_clients_configuration_starts_the_command():
    server = json.loads(block("json"))["mcpServers"]["holdfast"]
    assert server["args"][3:5] == ["starter.py", "mcp"]
