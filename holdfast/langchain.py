"""LangChain tools as tools of an agent.

    search = from_langchain(TavilySearch(), effect=Effect.READ, service="tavily")

A plain function needs no adapter: declare it by `@tool` (`holdfast.tools`).
"""

from __future__ import annotations

import asyncio
from typing import Any

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, StructuredTool, ToolException
from pydantic import BaseModel

from holdfast.contracts import Effect, Json
from holdfast.tools import Tool, ToolContext, ToolRefused, tool

KEY = "idempotency_key"
"""Where a tool finds the call's key: `config["configurable"]["idempotency_key"]`, when its function takes `config`."""


def from_langchain(base: BaseTool, *, effect: Effect, service: str, **declared: Any) -> Tool:
    """The tool that calls `base`, with its name, description and argument schema.

    effect, service, declared: as of `@tool`; undo and probe are attached to what is returned, as to any tool. The
    result is what a model would read; an artifact beside it is not kept. ToolException becomes ToolRefused.
    Raises TypeError for a tool that wants arguments injected, has no pydantic schema, or could not run safely.
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
    """What the tool says. Raises ToolRefused when it says so by a message, as `handle_tool_error` makes it do."""
    assert isinstance(message, ToolMessage)
    if message.status == "error":
        raise ToolRefused(str(message.content))
    return message.content


def _is_async(base: BaseTool) -> bool:
    """Whether it has code of its own for the loop; else LangChain would run it in a thread of the loop's few."""
    if isinstance(base, StructuredTool):
        return asyncio.iscoroutinefunction(base.coroutine)
    return type(base)._arun is not BaseTool._arun
