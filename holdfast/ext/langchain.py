"""Turns LangChain tools into an agent's tools.

    search = from_langchain(TavilySearch(), effect=Effect.READ, service="tavily")

A plain function needs no adapter: declare it with `@tool` (`holdfast.authoring.tools`).
"""

from __future__ import annotations

import asyncio
from typing import Any

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, StructuredTool, ToolException
from pydantic import BaseModel

from holdfast.authoring.tools import Tool, ToolContext, tool
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ToolRefused
from holdfast.contracts.profile import Effect

KEY = "idempotency_key"
"""A tool whose function takes `config` finds the call's key as `config["configurable"]["idempotency_key"]`."""


def from_langchain(base: BaseTool, *, effect: Effect, service: str, **declared: Any) -> Tool:
    """Returns a tool that calls `base`, with its name, description and argument schema.

    effect, service, declared: as for `@tool`. Undo and probe are attached to the returned tool, as to any tool. The
    result is the content for the model; an artifact is dropped. ToolException becomes ToolRefused.
    Raises TypeError for a tool that needs injected arguments, has no pydantic schema, or could not run safely.
    """
    schema = base.tool_call_schema
    if isinstance(schema, dict) or not issubclass(schema, BaseModel):
        raise TypeError(f"tool {base.name}: its args_schema has to be a pydantic model")
    wanted = set(getattr(base.get_input_schema(), "model_fields", ())) | getattr(
        base, "_injected_args_keys", frozenset()
    )
    if injected := sorted(wanted - set(schema.model_fields)):
        raise TypeError(
            f"tool {base.name}: {', '.join(injected)} would have to be injected by a LangGraph ToolNode, which has no"
            " place here; make it an ordinary argument, or read it in the tool"
        )

    def call(ctx: ToolContext, arguments: Json) -> tuple[Any, RunnableConfig]:
        config: RunnableConfig = {"configurable": {KEY: ctx.key}}
        return {"name": base.name, "args": arguments, "id": ctx.key, "type": "tool_call"}, config

    async def asynchronous(ctx: ToolContext, **arguments: Any) -> Any:
        try:
            return _content(await base.ainvoke(*call(ctx, arguments)))
        except ToolException as error:
            raise ToolRefused(str(error)) from error

    def synchronous(ctx: ToolContext, **arguments: Any) -> Any:
        try:
            return _content(base.invoke(*call(ctx, arguments)))
        except ToolException as error:
            raise ToolRefused(str(error)) from error

    function = asynchronous if _is_async(base) else synchronous
    function.__doc__ = base.description
    return tool(effect=effect, service=service, name=base.name, arguments=schema, **declared)(function)


def _content(message: Any) -> Any:
    """Returns the content. Raises ToolRefused for a message of status "error", which `handle_tool_error` produces."""
    assert isinstance(message, ToolMessage)
    if message.status == "error":
        raise ToolRefused(str(message.content))
    return message.content


def _is_async(base: BaseTool) -> bool:
    """Whether the tool has async code of its own. Otherwise LangChain would run it in the event loop's small thread
    pool."""
    if isinstance(base, StructuredTool):
        return asyncio.iscoroutinefunction(base.coroutine)
    return type(base)._arun is not BaseTool._arun
