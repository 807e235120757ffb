"""The public API for writing agents, in one import: `from holdfast import AgentSpec, Effect, ToolContext, tool`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.authoring.agent import AgentSpec
    from holdfast.authoring.batch import BatchContext, BatchSpec, item_id
    from holdfast.authoring.options import ModelAnswer, ModelOptions
    from holdfast.authoring.services import BreakerRule, Service
    from holdfast.authoring.tools import LastGood, NotReady, ToolContext, Undo, tool
    from holdfast.contracts.batch import BatchReport, Item, ItemFailure
    from holdfast.contracts.data import Json
    from holdfast.contracts.failures import ToolFailed, ToolRefused
    from holdfast.contracts.profile import Effect, StepSpec
    from holdfast.ext.langchain import from_langchain
    from holdfast.ext.mcp.spec import McpServer, McpTool

_HOME = {
    "AgentSpec": "authoring.agent",
    "BatchContext": "authoring.batch",
    "BatchReport": "contracts.batch",
    "BatchSpec": "authoring.batch",
    "BreakerRule": "authoring.services",
    "Effect": "contracts.profile",
    "Item": "contracts.batch",
    "ItemFailure": "contracts.batch",
    "Json": "contracts.data",
    "LastGood": "authoring.tools",
    "McpServer": "ext.mcp.spec",
    "McpTool": "ext.mcp.spec",
    "ModelAnswer": "authoring.options",
    "ModelOptions": "authoring.options",
    "NotReady": "authoring.tools",
    "Service": "authoring.services",
    "StepSpec": "contracts.profile",
    "ToolContext": "authoring.tools",
    "ToolFailed": "contracts.failures",
    "ToolRefused": "contracts.failures",
    "Undo": "authoring.tools",
    "from_langchain": "ext.langchain",
    "item_id": "authoring.batch",
    "tool": "authoring.tools",
}


def __getattr__(name: str) -> object:
    """Imports a name at its first use, so that commands that need none of them start fast."""
    if name not in _HOME:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    return getattr(import_module(f"holdfast.{_HOME[name]}"), name)


__all__ = [
    "AgentSpec",
    "BatchContext",
    "BatchReport",
    "BatchSpec",
    "BreakerRule",
    "Effect",
    "Item",
    "ItemFailure",
    "Json",
    "LastGood",
    "McpServer",
    "McpTool",
    "ModelAnswer",
    "ModelOptions",
    "NotReady",
    "Service",
    "StepSpec",
    "ToolContext",
    "ToolFailed",
    "ToolRefused",
    "Undo",
    "from_langchain",
    "item_id",
    "tool",
]
