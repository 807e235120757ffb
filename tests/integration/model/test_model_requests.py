"""What a request says besides its messages, and what becomes of it where an endpoint does not take it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from holdfast.authoring.options import ModelOptions
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ErrorType
from holdfast.reasoning.conversation import CUT
from holdfast.reasoning.model_client import ModelClient, ModelUnavailable
from holdfast.settings import ModelTarget
from holdfast.testing.model import FakeModel, error, say
from tests.integration.model.test_models import MESSAGES, TOOL, settings

Refuses = Callable[[Json], str | None]
"""What the endpoint has against a request; None: nothing."""


@asynccontextmanager
async def endpoint(
    refuses: Refuses = lambda body: None, **changes: Any
) -> AsyncIterator[tuple[ModelClient, list[Json]]]:
    """A client of an endpoint that answers 400 with these words, and the bodies that it got."""
    async with FakeModel.serve() as server:
        server.script = lambda _: error(400, words=why) if (why := refuses(server.bodies[-1])) else say("fine")
        client = ModelClient(settings(server.url, **changes))
        try:
            yield client, server.bodies
        finally:
            await client.close()


async def test_the_limit_of_an_answer_goes_with_every_request_and_the_lower_one_wins() -> None:
    async with endpoint(HOLDFAST_MODEL_MAX_TOKENS=1000) as (client, bodies):
        await client.complete(MESSAGES, [], key="k")
        await client.complete(MESSAGES, [], key="k", options=ModelOptions(max_tokens=200))
        await client.complete(MESSAGES, [], key="k", options=ModelOptions(max_tokens=9000))
    assert [each["max_tokens"] for each in bodies] == [1000, 200, 1000]


async def test_the_limit_leaves_room_for_the_request_in_a_declared_window() -> None:
    long: list[Json] = [{"role": "user", "content": "x" * 6000}]
    async with endpoint(HOLDFAST_MODEL_WINDOW=4000) as (client, bodies):
        await client.complete(MESSAGES, [], key="k")
        await client.complete(long, [], key="k")
        await client.complete([*long, *long], [], key="k")
    assert 3900 < bodies[0]["max_tokens"] < 4000
    assert 1900 < bodies[1]["max_tokens"] < 2000
    assert bodies[2]["max_tokens"] == 256


async def test_further_parameters_of_the_model_and_of_the_agent_which_wins() -> None:
    changes = {"HOLDFAST_MODEL_TEMPERATURE": 0.9, "HOLDFAST_MODEL_EXTRA": {"seed": 1, "reasoning_effort": "low"}}
    wanted = ModelOptions(temperature=0.1, schema={"type": "object"}, extra={"seed": 2})
    async with endpoint(**changes) as (client, bodies):
        await client.complete(MESSAGES, [], key="k")
        await client.complete(MESSAGES, [TOOL], key="k", options=wanted, must_call=True)
    first, second = bodies
    assert (first["temperature"], first["seed"], first["reasoning_effort"]) == (0.9, 1, "low")
    assert not {"tool_choice", "response_format"} & {*first}
    assert (second["temperature"], second["seed"], second["reasoning_effort"]) == (0.1, 2, "low")
    assert second["tool_choice"] == "required"
    assert second["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}},
    }


async def test_without_tools_none_can_be_required() -> None:
    async with endpoint() as (client, bodies):
        await client.complete(MESSAGES, [], key="k", must_call=True)
    assert "tool_choice" not in bodies[0]


def refuses(*names: str) -> Refuses:
    return lambda body: next((f"Unsupported parameter: '{name}'" for name in names if name in body), None)


async def test_the_limit_goes_by_its_other_name_where_an_endpoint_wants_that() -> None:
    def newer(body: Json) -> str | None:
        return "'max_tokens' is not supported, use 'max_completion_tokens'" if "max_tokens" in body else None

    async with endpoint(newer) as (client, bodies):
        assert (await client.complete(MESSAGES, [], key="k")).text == "fine"
        await client.complete(MESSAGES, [], key="k")
    names = [sorted({"max_tokens", "max_completion_tokens"} & {*each}) for each in bodies]
    assert names == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]


async def test_a_name_that_is_set_is_kept() -> None:
    async with endpoint(HOLDFAST_MODEL_LIMIT_NAME="max_completion_tokens") as (client, bodies):
        await client.complete(MESSAGES, [], key="k")
    assert bodies[0]["max_completion_tokens"] == 8192


@pytest.mark.parametrize(
    "refused",
    [
        ("tool_choice",),
        ("temperature",),
        ("response_format",),
        ("stream_options",),
        ("max_tokens", "max_completion_tokens"),
        ("tool_choice", "temperature", "response_format", "max_tokens", "max_completion_tokens"),
    ],
)
async def test_what_an_endpoint_refuses_is_left_out_and_not_sent_again(refused: tuple[str, ...]) -> None:
    wanted = ModelOptions(temperature=0.1, schema={"type": "object"})
    async with endpoint(refuses(*refused)) as (client, bodies):
        assert (await client.complete(MESSAGES, [TOOL], key="k", options=wanted, must_call=True)).text == "fine"
        assert len(bodies) == len(refused) + 1
        await client.complete(MESSAGES, [TOOL], key="k", options=wanted, must_call=True)
        assert len(bodies) == len(refused) + 2
    assert not {*refused} & {*bodies[-1]}


async def test_a_refusal_of_anything_else_is_asked_once() -> None:
    async with endpoint(lambda body: "messages[0]: bad temperature_unit") as (client, bodies):
        with pytest.raises(ModelUnavailable) as caught:
            await client.complete(MESSAGES, [], key="k")
    assert (caught.value.failure.type, len(bodies)) == (ErrorType.REFUSED, 1)


async def test_a_limit_too_large_for_the_window_is_left_out_of_that_request_only() -> None:
    def small(body: Json) -> str | None:
        large = len(json.dumps(body["messages"])) > 1000 and "max_tokens" in body
        return "max_tokens is too large: 8192. This model's maximum context length is 9000" if large else None

    async with endpoint(small) as (client, bodies):
        await client.complete([{"role": "user", "content": "x" * 2000}], [], key="k")
        await client.complete(MESSAGES, [], key="k")
    assert ["max_tokens" in each for each in bodies] == [True, False, True]


async def test_only_we_know_that_an_answer_was_cut() -> None:
    async with endpoint() as (client, bodies):
        await client.complete([*MESSAGES, {**say("half a"), CUT: True}], [], key="k")
    assert bodies[0]["messages"][1] == say("half a")


def test_what_holdfast_sets_itself_is_refused_at_the_door() -> None:
    with pytest.raises(TypeError, match=r"sets messages itself; remove it from `extra`"):
        ModelOptions(extra={"messages": []})
    with pytest.raises(TypeError, match="at least 1"):
        ModelOptions(max_tokens=0)
    with pytest.raises(ValueError, match="Holdfast sets stream itself"):
        ModelTarget(model="m", extra={"stream": False})
