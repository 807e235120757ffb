"""The scripted model over real HTTP, in its own process, spoken to by the real `openai` client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from holdfast.authoring.registry import agent
from holdfast.dev.simulation.script import LABEL, decide
from holdfast.dev.simulation.scripted_model import FINGERPRINT, MODEL, ModelRecord, tokens
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.services import Running, service, until

SPEC = agent("discharge")
MESSAGES: Any = SPEC.messages({"patient_id": "pat-2"})
TOOLS: Any = [each.openai for each in SPEC.tools]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with service("scripted_model", tmp_path_factory.mktemp("model") / "model.db") as running:
        yield running


@pytest.fixture
async def client(model: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{model.url}/v1", max_retries=0, timeout=10) as client:
        yield client
    httpx2.delete(f"{model.url}/faults", timeout=PATIENCE_S)


@pytest.fixture
def record(model: Running) -> ModelRecord:
    return ModelRecord(model.db)


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name}/turn-1"


def fault(model: Running, **what: Any) -> None:
    httpx2.put(f"{model.url}/faults/model", json=what, timeout=PATIENCE_S).raise_for_status()


async def streamed(client: openai.AsyncOpenAI, key: str, tools: Any = TOOLS) -> list[ChatCompletionChunk]:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        tools=tools,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"Idempotency-Key": key},
    )
    return [chunk async for chunk in stream]


async def test_an_answer_in_one_piece(client, key, record):
    answer = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=TOOLS, extra_headers={"Idempotency-Key": key}
    )
    assert (answer.model, answer.system_fingerprint) == (MODEL, FINGERPRINT)
    assert answer.choices[0].finish_reason == "tool_calls"
    message = answer.choices[0].message.model_dump(include={"role", "tool_calls"})
    assert message == decide(MESSAGES, TOOLS)
    assert answer.usage.prompt_tokens == tokens([MESSAGES, TOOLS])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    await until(lambda: record.calls(key)[0].answered_at)


async def test_a_stream_says_the_same_in_pieces_with_usage_at_the_end(client, key, record):
    chunks = await streamed(client, key)
    assert all(chunk.system_fingerprint == FINGERPRINT for chunk in chunks)
    calls: dict[int, list[str]] = {}
    for chunk in chunks[:-1]:
        for call in chunk.choices[0].delta.tool_calls or ():
            name, arguments = calls.setdefault(call.index, ["", ""])
            calls[call.index] = [name + (call.function.name or ""), arguments + (call.function.arguments or "")]
    expected = [call["function"] for call in decide(MESSAGES, TOOLS)["tool_calls"]]
    assert list(calls.values()) == [[each["name"], each["arguments"]] for each in expected]
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert (chunks[-1].choices, chunks[-1].usage.prompt_tokens) == ([], tokens([MESSAGES, TOOLS]))
    await until(lambda: record.calls(key)[0].answered_at)


async def test_words_come_in_several_chunks_and_are_labelled(client, key):
    chunks = await streamed(client, key, tools=openai.omit)
    pieces = [piece for chunk in chunks[:-1] if (piece := chunk.choices[0].delta.content)]
    assert len(pieces) > 1
    assert "".join(pieces).startswith(LABEL)


async def test_usage_comes_only_when_asked_for(client):
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in [chunk async for chunk in stream])


async def test_models_are_listed(client):
    assert [each.id async for each in client.models.list()] == [MODEL]


async def test_a_request_that_is_none_is_a_400_that_says_why(client, model):
    with pytest.raises(openai.BadRequestError, match="messages"):
        await client.post("/chat/completions", body={"model": MODEL}, cast_to=httpx2.Response)


async def test_calls_are_counted_per_key_however_often_they_come(client, model, key):
    for _ in range(2):
        await streamed(client, key)
    ledger: Any = {}
    while ledger.get("answered") != 2:
        ledger = httpx2.get(f"{model.url}/ledger", params={"prefix": key}, timeout=PATIENCE_S).json()
    assert (ledger["calls"], ledger["keys"]) == (2, {key: {"calls": 2, "answered": 2}})
    assert ledger["input_tokens"] == 2 * tokens([MESSAGES, TOOLS])


async def test_a_failure_on_order_is_no_call(client, model, key, record):
    fault(model, mode="fail", times=1, status=429, retry_after=2)
    with pytest.raises(openai.RateLimitError) as caught:
        await streamed(client, key)
    assert caught.value.response.headers["Retry-After"] == "2"
    assert all(call.answered_at is None for call in record.calls(key))
    assert len(await streamed(client, key)) > 3


async def test_a_drop_in_the_middle_of_a_stream_is_received_and_not_answered(client, model, key, record):
    fault(model, mode="drop", times=1)
    got = []
    with pytest.raises((openai.APIConnectionError, httpx2.TransportError)):
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, tools=TOOLS, stream=True, extra_headers={"Idempotency-Key": key}
        )
        async for chunk in stream:
            got.append(chunk)
    assert len(got) == 1
    assert [call.answered_at for call in record.calls(key)] == [None]


async def test_a_hang_ends_with_the_patience_of_the_client_and_holds_up_nobody(client, model, key, record):
    fault(model, mode="hang", times=1)
    hanging = asyncio.create_task(streamed(client, key))
    await until(lambda: record.calls(key))
    assert len(await streamed(client, f"{key}/other")) > 3
    assert not hanging.done()
    hanging.cancel()


async def test_a_client_that_hung_up_while_the_model_thought_was_not_answered(tmp_path):
    """So a worker killed before the answer is not counted as paid twice."""
    with service("scripted_model", tmp_path / "model.db", "--think", "0.3") as running:
        record = ModelRecord(running.db)
        async with openai.AsyncOpenAI(api_key="x", base_url=f"{running.url}/v1", max_retries=0) as client:
            began = time.monotonic()
            await streamed(client, "patient")
            assert time.monotonic() - began >= 0.3
            with pytest.raises(openai.APITimeoutError):
                await streamed(client.with_options(timeout=0.1), "hasty")
            await streamed(client, "later")
            await until(lambda: record.calls("later")[0].answered_at)
        assert [call.answered_at is None for call in record.calls()] == [False, True, False]
