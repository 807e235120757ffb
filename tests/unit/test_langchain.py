"""LangChain tools as tools of an agent: what they say, refuse and need arrives unchanged."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import pytest
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, InjectedToolArg, StructuredTool, ToolException
from langchain_core.tools import tool as langchain_tool
from langgraph.prebuilt import InjectedState, ToolRuntime
from pydantic import BaseModel, Field, ValidationError

from holdfast.authoring.tools import Tool, ToolContext, Undo
from holdfast.contracts.failures import ToolRefused
from holdfast.contracts.profile import Effect
from holdfast.ext.langchain import from_langchain


def context(key: str = "run/1") -> ToolContext:
    return ToolContext(key=key, attempt=1, http=None, service_url=str, ask_model=None)  # type: ignore[arg-type]


@langchain_tool
def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


@langchain_tool
async def book(room: str, config: RunnableConfig) -> str:
    """Book a room."""
    if room == "none":
        raise ToolException("there is no such room")
    return f"booked under {config['configurable']['idempotency_key']}"


def read(base: BaseTool, **declared: Any) -> Tool:
    return from_langchain(base, effect=Effect.READ, service="test", **declared)


async def test_name_description_and_schema_are_the_tools_own() -> None:
    made = read(add, timeout=3, retries=1)
    function = made.openai["function"]
    assert (function["name"], function["description"]) == ("add", "Add two numbers.")
    assert (list(function["parameters"]["properties"]), function["parameters"]["required"]) == (["a", "b"], ["a"])
    assert (made.effect, made.service, made.timeout_s, made.retries) == (Effect.READ, "test", 3, 1)
    assert made.validate({"a": 1}) == {"a": 1, "b": 2}
    with pytest.raises(ValidationError):
        made.validate({"a": "x"})
    assert await made.call(context(), {"a": 1}) == "3"


async def test_a_tool_may_hand_the_key_of_its_call_downstream() -> None:
    made = from_langchain(book, effect=Effect.IDEMPOTENT, service="hotel")
    assert "config" not in made.openai["function"]["parameters"]["properties"]
    assert await made.call(context("run/7"), {"room": "12"}) == "booked under run/7"


@pytest.mark.parametrize("handled", [False, True, "it says: no"])
async def test_what_a_tool_refuses_is_the_callers_mistake_however_it_handles_it(handled: Any) -> None:
    refuses = book.model_copy(update={"handle_tool_error": handled})
    with pytest.raises(ToolRefused, match="no"):
        await from_langchain(refuses, effect=Effect.IDEMPOTENT, service="hotel").call(context(), {"room": "none"})


async def test_the_model_reads_the_content_and_not_the_artifact() -> None:
    @langchain_tool(response_format="content_and_artifact")
    def chart(n: int) -> tuple[str, bytes]:
        """Draw."""
        return f"{n} bars", b"..."

    assert await read(chart).call(context(), {"n": 3}) == "3 bars"


async def test_a_class_of_ones_own_with_nested_arguments() -> None:
    class Item(BaseModel):
        name: str

    class Order(BaseModel):
        items: list[Item] = Field(min_length=1)

    class OrderTool(BaseTool):
        name: str = "order"
        description: str = "Order items."
        args_schema: Any = Order

        def _run(self, items: list[Item]) -> str:
            return ", ".join(item.name for item in items)

    assert await read(OrderTool()).call(context(), {"items": [{"name": "pen"}]}) == "pen"


async def test_undo_and_probe_are_attached_as_to_any_tool() -> None:
    made = from_langchain(book, effect=Effect.PROBE, service="hotel")
    with pytest.raises(TypeError, match="effect class `probe` needs a probe"):
        made.check()

    @made.probe
    async def booked(ctx: ToolContext, room: str) -> str | None:
        return None

    @made.undo
    async def cancel(ctx: ToolContext, undo: Undo) -> str:
        return f"cancelled {undo.key}"

    made.check()
    assert await made.run_undo(context(), Undo(key="run/1", arguments={}, result=None)) == "cancelled run/1"


def test_a_sync_tool_cannot_be_of_a_class_that_must_be_stoppable() -> None:
    with pytest.raises(TypeError, match="tool add: of effect class manual, so it has to be async"):
        from_langchain(add, effect=Effect.MANUAL, service="test")


async def test_a_sync_tool_does_not_block_the_loop() -> None:
    import threading

    ran: list[str] = []

    def where(n: int) -> str:
        """Say where."""
        ran.append(threading.current_thread().name)
        return "ok"

    await asyncio.gather(read(StructuredTool.from_function(where)).call(context(), {"n": 1}))
    assert ran[0].startswith("tool")


def test_injected_arguments_and_bare_schemas_are_refused_where_they_are_declared() -> None:
    @langchain_tool
    def by_argument(n: int, user: Annotated[str, InjectedToolArg]) -> str:
        """x."""
        return user

    @langchain_tool
    def by_state(n: int, state: Annotated[dict[str, Any], InjectedState]) -> str:
        """x."""
        return "x"

    @langchain_tool
    def by_runtime(n: int, runtime: ToolRuntime) -> str:
        """x."""
        return "x"

    for base, name in ((by_argument, "user"), (by_state, "state"), (by_runtime, "runtime")):
        with pytest.raises(TypeError, match=f"{name} would have to be injected"):
            read(base)
    bare = StructuredTool(
        name="bare", description="x", args_schema={"type": "object", "properties": {}}, func=lambda: "x"
    )
    with pytest.raises(TypeError, match="its args_schema has to be a pydantic model"):
        read(bare)
