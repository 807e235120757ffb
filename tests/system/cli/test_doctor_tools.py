"""`doctor` asks each model for one tool call: an endpoint that ignores tools takes every request and does nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from holdfast.cli import doctor
from holdfast.dev.stack import Stack
from holdfast.settings import ModelTarget, Settings
from holdfast.testing.model import FakeModel, Message, call, error, say
from tests.fixtures.stack import Cli


def test_the_scripted_model_calls_its_tool(stack: Stack, cli: Cli) -> None:
    checks = {each["what"]: each for each in json.loads(cli("doctor", "--json").stdout)}
    assert checks["tool calls of scripted-1"]["ok"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (say("Ready!"), "the endpoint ignores tools"),
        (call(("search", {})), "it called search"),
        (call(("report_ready", "{")), "arguments that are no JSON"),
        (error(503), "not tried: model house-1"),
    ],
)
async def test_a_model_that_calls_no_tools_is_found(
    answer: Message, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeModel.serve() as model:
        model.script = lambda messages: answer
        found = await tried(model, monkeypatch)
        assert not found.ok and found.needed
        assert words in found.found
        assert len(model.requests) == 1
        assert model.bodies[0]["tool_choice"] == "required"


async def test_a_model_that_calls_it_is_well_and_every_fallback_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeModel.serve() as model:
        model.script = lambda messages: call(("report_ready", {"word": "ready"}))
        assert (await tried(model, monkeypatch)).ok
        assert [each.what for each in await doctor._tools()] == ["tool calls of house-1", "tool calls of house-2"]  # pyright: ignore[reportPrivateUsage]


async def tried(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    given = Settings(openai_base_url=model.url, model="house-1", model_fallbacks=(ModelTarget(model="house-2"),))
    monkeypatch.setattr(doctor, "settings", lambda: given)
    return await doctor._calls_tools(given.models[0])  # pyright: ignore[reportPrivateUsage]
