"""The model client against real servers: llmock for a well-behaved endpoint, raw sockets for the others."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from llmock.pytest_plugin import LLMock

from holdfast.authoring.options import ModelAnswer
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ErrorType, Failure
from holdfast.contracts.turn import Usage
from holdfast.reasoning.answers import ModelUnavailable
from holdfast.reasoning.model_client import ModelClient
from holdfast.reliability.errors import classify
from holdfast.settings import Settings
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.wire import END, STREAM, Pause, Step, Then, Wire, answer, event, free_port, piece, wire

KEY = "4f1c0ffee-of-a-shape-unknown"
MESSAGES: list[Json] = [{"role": "user", "content": "Discharge pat-1"}]
TOOL: Json = {"type": "function", "function": {"name": "order", "parameters": {"type": "object", "properties": {}}}}


def settings(url: str, **changes: Any) -> Settings:
    return Settings(**{"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY, "HOLDFAST_MODEL": "gpt-5-mini", **changes})


@asynccontextmanager
async def model(*steps: Step, **changes: Any) -> AsyncIterator[tuple[ModelClient, Wire]]:
    """A client of a server that plays the steps on each request."""
    async with wire(*steps) as server:
        client = ModelClient(settings(f"{server.url}/v1", **changes))
        try:
            yield client, server
        finally:
            await client.close()


async def ask(*steps: Step, **changes: Any) -> ModelAnswer:
    async with model(*steps, **changes) as (client, _):
        return await client.complete(MESSAGES, [], key="k/turn-1")


async def failure(*steps: Step, **changes: Any) -> Failure:
    with pytest.raises(ModelUnavailable) as caught:
        await ask(*steps, **changes)
    return caught.value.failure


def delta(content: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    """One chunk of a stream."""
    change = {**({} if content is None else {"content": content}), **more.pop("delta", {})}
    return event({"model": "gpt-5-mini", "choices": [{"index": 0, "delta": change, "finish_reason": finish}], **more})


def calls(*parts: Json) -> bytes:
    return delta(delta={"tool_calls": list(parts)})


def part(index: int | None, id: str | None = None, name: str | None = None, arguments: str | None = None) -> Json:
    whole = {"index": index, "id": id, "function": {"name": name, "arguments": arguments}}
    return {name: value for name, value in whole.items() if value is not None}


USAGE = event({"choices": [], "usage": {"prompt_tokens": 1000, "completion_tokens": 100}})
DONE = event("[DONE]") + END
WHOLE = STREAM + delta("Hello", delta={"role": "assistant"}) + delta(" you") + delta(finish="stop") + USAGE + DONE


# ------------------------------------------------------------------ what is sent


async def test_request_is_a_streamed_chat_completion_with_key_and_credentials() -> None:
    async with model(WHOLE) as (client, server):
        await client.complete(MESSAGES, [TOOL], key="run/turn-3")

    head, _ = server.requests[0]
    assert head.startswith("POST /v1/chat/completions HTTP/1.1")
    assert "idempotency-key: run/turn-3\r\n" in head.lower()
    assert f"authorization: bearer {KEY}\r\n" in head.lower()
    assert server.json() == {
        "model": "gpt-5-mini",
        "messages": MESSAGES,
        "tools": [TOOL],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 8192,
    }


@pytest.mark.parametrize("status", [200, 400, 401, 429, 503])
async def test_the_direct_way_sends_and_fails_as_chat_completions_create_does(status: int) -> None:
    reply = WHOLE if status == 200 else answer(status, {"error": {"message": "no"}}, retry_after="3")
    async with model(reply) as (client, server):
        plain = openai.AsyncOpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0)
        ours = await outcome(client.complete(MESSAGES, [TOOL], key="k"))
        theirs = await outcome(
            plain.chat.completions.create(  # pyright: ignore[reportCallIssue]
                model="gpt-5-mini",
                messages=MESSAGES,  # pyright: ignore[reportArgumentType]
                tools=[TOOL],  # pyright: ignore[reportArgumentType]
                stream=True,
                stream_options={"include_usage": True},
                max_tokens=8192,
                extra_headers={"Idempotency-Key": "k"},
            )
        )
        await plain.close()

    assert server.json(0) == server.json(1)
    lines = [{line for line in head.splitlines() if "read-timeout" not in line} for head, _ in server.requests]
    assert lines[0] == lines[1]
    assert ours == theirs


async def outcome(call: Awaitable[Any]) -> tuple[Any, ...]:
    """What a caller has to act on: how it failed, or that it did not."""
    try:
        await call
    except (ModelUnavailable, openai.OpenAIError) as error:
        failure = classify(error)
        return failure.type, failure.retry, failure.maybe_done, failure.retry_after
    return ()


async def test_no_tools_are_not_sent_as_an_empty_list() -> None:
    async with model(WHOLE) as (client, server):
        await client.complete(MESSAGES, [], key="k")

    assert "tools" not in server.json()


async def test_connection_is_used_again() -> None:
    async with model(WHOLE) as (client, server):
        for turn in range(5):
            await client.complete(MESSAGES, [], key=f"k/turn-{turn}")

    assert (len(server.requests), server.connections) == (5, 1)


async def test_two_hundred_calls_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.reasoning.model_client.CONNECT_S", PATIENCE_S)
    async with model(STREAM, Pause(0.05), WHOLE.removeprefix(STREAM)) as (client, server):
        answers = await asyncio.gather(*(client.complete(MESSAGES, [], key=str(n)) for n in range(200)))

    assert [each.text for each in answers] == ["Hello you"] * 200
    assert len(server.requests) == 200


# ------------------------------------------------------------------ what comes back


async def test_text() -> None:
    done = await ask(WHOLE)

    assert done.message == {"role": "assistant", "content": "Hello you"}
    assert (done.text, done.model, done.finish_reason, done.simulated) == ("Hello you", "gpt-5-mini", "stop", False)


async def test_tool_calls_in_pieces_and_interleaved() -> None:
    done = await ask(
        STREAM,
        calls(part(0, "call-a", "order", "")),
        calls(part(0, arguments='{"item":')),
        calls(part(1, "call-b", "book", '{"da'), part(0, arguments=' "x"}')),
        calls(part(1, arguments='y": 2}')),
        delta(finish="tool_calls") + USAGE + DONE,
    )

    assert done.message == {
        "role": "assistant",
        "tool_calls": [
            {"id": "call-a", "type": "function", "function": {"name": "order", "arguments": '{"item": "x"}'}},
            {"id": "call-b", "type": "function", "function": {"name": "book", "arguments": '{"day": 2}'}},
        ],
    }
    assert done.finish_reason == "tool_calls"


async def test_tool_calls_without_an_index() -> None:
    done = await ask(
        STREAM,
        calls(part(None, "a", "order", "{")),
        calls(part(None, arguments="}")),
        calls(part(None, "b", "book", "{}")),
        delta(finish="tool_calls") + DONE,
    )

    called = [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in done.message["tool_calls"]]
    assert called == [("a", "order", "{}"), ("b", "book", "{}")]


async def test_words_beside_tool_calls_and_length() -> None:
    done = await ask(STREAM, delta("I order."), calls(part(0, "a", "order", "{}")), delta(finish="length") + DONE)

    assert done.text == "I order." and done.message["tool_calls"]
    assert done.finish_reason == "length"


async def test_refusal_is_the_answer_in_words() -> None:
    done = await ask(
        STREAM, delta(delta={"refusal": "I can"}), delta(delta={"refusal": "not."}), delta(finish="stop"), DONE
    )

    assert done.message == {"role": "assistant", "refusal": "I cannot."}
    assert done.text == "I cannot."


async def test_characters_that_other_line_readers_split_at_and_any_cut_of_the_bytes() -> None:
    text = "a\u2028b\u0085c – d"
    whole = STREAM.removesuffix(b"\r\n\r\n").replace(b"transfer-encoding: chunked", b"connection: close") + b"\r\n\r\n"
    body = b": keep-alive\r\n\r\n" + event_bytes(text) + event_bytes("", "stop") + b"data: [DONE]\r\n\r\n"

    done = await ask(whole, *(bytes([byte]) for byte in body), Then.CLOSE)

    assert done.text == text


def event_bytes(content: str, finish: str | None = None) -> bytes:
    """A chunk as plain bytes, without the framing of a chunked body."""
    framed = delta(content, finish)
    return framed.partition(b"\r\n")[2].removesuffix(b"\r\n")


async def test_answer_survives_the_way_through_the_ledger() -> None:
    done = await ask(WHOLE)

    assert ModelAnswer.from_json(done.to_json()) == done


async def test_nothing_after_done_can_spoil_a_complete_answer() -> None:
    complete = WHOLE.removesuffix(END)

    for after in (Then.HANG, Then.RESET, Then.CLOSE):
        assert (await ask(complete, after)).text == "Hello you"


# ------------------------------------------------------------------ usage and cost


async def test_usage_and_cost() -> None:
    done = await ask(WHOLE)

    # gpt-5-mini: $0.25 per million tokens read, $2 per million written
    assert done.usage == Usage(calls=1, input_tokens=1000, output_tokens=100, cost_usd=0.00045)


async def test_cached_tokens_cost_less() -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "prompt_tokens_details": {"cached_tokens": 800}}

    done = await ask(STREAM, delta("x", "stop", usage=usage), DONE)

    assert done.usage.input_tokens == 1000
    assert 0.00025 < done.usage.cost_usd < 0.0003


@pytest.mark.parametrize("usage", [USAGE, b""])
async def test_unpriced(usage: bytes) -> None:
    chunk = {"model": "house-model" if usage else "gpt-5-mini"}

    done = await ask(
        STREAM, event({**chunk, "choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}), usage, DONE
    )

    assert (done.usage.calls, done.usage.cost_usd, done.usage.unpriced) == (1, 0, 1)


async def test_simulated_model_costs_nothing_and_is_labelled() -> None:
    done = await ask(STREAM, delta("x", "stop", system_fingerprint="simulated"), USAGE, DONE)

    assert done.simulated
    assert done.usage == Usage(calls=1, input_tokens=1000, output_tokens=100)


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("status", "error", "type", "retry"),
    [
        (400, {"message": "bad"}, ErrorType.REFUSED, False),
        (400, {"message": "too long", "code": "context_length_exceeded"}, ErrorType.CONTEXT_OVERFLOW, False),
        (400, {"message": "no", "code": "content_filter"}, ErrorType.CONTENT_POLICY, False),
        (401, {"message": f"Incorrect API key: {KEY}"}, ErrorType.UNAUTHORIZED, False),
        (429, {"message": "pay", "code": "insufficient_quota"}, ErrorType.UNAUTHORIZED, False),
        (500, {"message": f"crashed with {KEY}"}, ErrorType.UNAVAILABLE, True),
        (503, {"message": "overloaded"}, ErrorType.UNAVAILABLE, True),
    ],
)
async def test_status_is_classified_and_asked_once(status: int, error: Json, type: ErrorType, retry: bool) -> None:
    async with model(answer(status, {"error": error})) as (client, server):
        with pytest.raises(ModelUnavailable) as caught:
            await client.complete(MESSAGES, [], key="k")

    assert (caught.value.failure.type, caught.value.failure.retry) == (type, retry)
    assert len(server.requests) == 1
    assert f"answered {status}" in str(caught.value) and "gpt-5-mini" in str(caught.value)


async def test_rate_limit_tells_when() -> None:
    limited = await failure(answer(429, {"error": {"message": "slow"}}, retry_after="7"))

    assert (limited.type, limited.retry, limited.retry_after) == (ErrorType.RATE_LIMITED, True, 7)


async def test_nobody_listens() -> None:
    client = ModelClient(settings(f"http://127.0.0.1:{free_port()}/v1"))
    with pytest.raises(ModelUnavailable) as caught:
        await client.complete(MESSAGES, [], key="k")
    await client.close()

    assert (caught.value.failure.type, caught.value.failure.retry) == (ErrorType.UNREACHABLE, True)


@pytest.mark.parametrize(
    ("steps", "type"),
    [
        pytest.param([delta("Hel"), Then.RESET], ErrorType.CONNECTION, id="reset"),
        pytest.param([delta("Hel"), Then.CLOSE], ErrorType.CONNECTION, id="closed"),
        pytest.param([delta("Hel"), END], ErrorType.BAD_RESPONSE, id="ended in good order"),
        pytest.param([delta("Hel"), DONE], ErrorType.BAD_RESPONSE, id="done before a finish reason"),
        pytest.param([END], ErrorType.BAD_RESPONSE, id="nothing"),
        pytest.param([event('{"choices": [')], ErrorType.BAD_RESPONSE, id="broken JSON"),
        pytest.param([event([1])], ErrorType.BAD_RESPONSE, id="no object"),
        pytest.param([event({"choices": ["x"]})], ErrorType.BAD_RESPONSE, id="no choice"),
        pytest.param([event({"error": {"message": "crash"}})], ErrorType.UNAVAILABLE, id="error event"),
        pytest.param([event({"error": "crash"})], ErrorType.UNAVAILABLE, id="error event in words"),
        pytest.param([piece(b"data: \xff\n\n")], ErrorType.BAD_RESPONSE, id="no text"),
    ],
)
async def test_broken_stream_is_retried_never_taken_for_an_answer(steps: list[Step], type: ErrorType) -> None:
    broken = await failure(STREAM, *steps)

    assert (broken.type, broken.retry) == (type, True)


async def test_answer_that_is_no_stream() -> None:
    assert (await failure(answer(200, b"<html>gateway</html>", "text/html"))).type is ErrorType.BAD_RESPONSE


async def test_content_filter_inside_the_answer_is_final() -> None:
    filtered = await failure(STREAM, delta("I will"), delta(finish="content_filter"), DONE)

    assert (filtered.type, filtered.retry) == (ErrorType.CONTENT_POLICY, False)


async def test_missing_key_for_openai_says_what_to_set() -> None:
    client = ModelClient(settings("https://api.openai.com/v1", OPENAI_API_KEY=" "))
    with pytest.raises(ModelUnavailable, match="set OPENAI_API_KEY") as caught:
        await client.complete(MESSAGES, [], key="k")
    await client.close()

    assert (caught.value.failure.type, caught.value.failure.retry) == (ErrorType.UNAUTHORIZED, False)


async def test_endpoint_of_ones_own_needs_no_key() -> None:
    assert (await ask(WHOLE, OPENAI_API_KEY="")).text == "Hello you"


@pytest.mark.parametrize(
    ("steps", "key"),
    [
        pytest.param([answer(401, {"error": {"message": f"wrong: {KEY}"}})], KEY, id="refused"),
        pytest.param([answer(400, f"Authorization: Bearer {KEY}".encode(), "text/plain")], KEY, id="echoed"),
        pytest.param([STREAM, event({"error": {"message": f"Bearer {KEY}"}})], KEY, id="in the stream"),
        pytest.param([WHOLE], f"{KEY}\nx", id="illegal header"),
        pytest.param([WHOLE], f"{KEY}é\u2026", id="no ASCII"),
    ],
)
async def test_key_is_in_no_exception_text(steps: list[Step], key: str) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        await ask(*steps, OPENAI_API_KEY=key)

    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__cause__ is None


# ------------------------------------------------------------------ deadlines

QUICK = {"HOLDFAST_MODEL_FIRST_TOKEN_S": 0.3, "HOLDFAST_MODEL_BETWEEN_TOKENS_S": 0.3, "HOLDFAST_MODEL_TOTAL_S": 10}
COMMENT = piece(b": still thinking\n\n")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        pytest.param([Then.HANG], "no first token within 0.3 s", id="no answer"),
        pytest.param([STREAM, Then.HANG], "no first token within 0.3 s", id="no event"),
        pytest.param([STREAM, *[COMMENT, Pause(0.1)] * 10], "no first token within 0.3 s", id="comments only"),
        pytest.param([STREAM, delta("x"), Then.HANG], "silent for 0.3 s", id="stalls"),
        pytest.param([STREAM, delta("x"), *[COMMENT, Pause(0.1)] * 10], "silent for 0.3 s", id="stalls with comments"),
        pytest.param([b"HTTP/1.1 500 X\r\ncontent-length: 9\r\n\r\n", Then.HANG], "no first token", id="half an error"),
    ],
)
async def test_silence_is_a_timeout(steps: list[Step], words: str) -> None:
    silent = await failure(*steps, **QUICK)

    assert (silent.type, silent.retry) == (ErrorType.TIMEOUT, True)
    assert words in silent.message


async def test_healthy_stream_longer_than_the_silence_allowed_is_not_cut() -> None:
    tokens = [step for n in range(12) for step in (delta(str(n)), Pause(0.06))]

    done = await ask(STREAM, *tokens, delta(finish="stop"), DONE, **QUICK)

    assert done.text == "".join(map(str, range(12)))


async def test_stream_that_never_ends_is_cut_in_all() -> None:
    endless = await failure(STREAM, *[delta("x"), Pause(0.05)] * 40, **{**QUICK, "HOLDFAST_MODEL_TOTAL_S": 0.5})

    assert endless.type is ErrorType.TIMEOUT
    assert "not finished within 0.5 s" in endless.message


async def test_cancelling_a_call_is_not_a_failure_and_leaves_no_connection() -> None:
    async with model(STREAM, delta("x"), Then.HANG) as (client, server):
        call = asyncio.create_task(client.complete(MESSAGES, [], key="k"))
        await server.asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


# ------------------------------------------------------------------ an endpoint somebody else wrote


async def test_llmock_tool_call_and_answer(llmock: LLMock) -> None:
    client = ModelClient(settings(llmock.base_url("openai")))
    llmock.call_tool("order", {"item": "x"})

    called = await client.complete(MESSAGES, [TOOL], key="k/turn-1")
    (call,) = called.message["tool_calls"]
    result: Json = {"role": "tool", "tool_call_id": call["id"], "content": "ordered"}
    done = await client.complete([*MESSAGES, called.message, result], [TOOL], key="k/turn-2")
    await client.close()

    assert (call["function"]["name"], called.finish_reason) == ("order", "tool_calls")
    assert done.text and done.finish_reason == "stop"
    assert called.usage.calls == 1 and called.usage.input_tokens > 0


@pytest.mark.parametrize(
    ("fault", "type"),
    [
        ("disconnect", ErrorType.CONNECTION),
        ("truncate", ErrorType.BAD_RESPONSE),
        ("corrupt", ErrorType.BAD_RESPONSE),
        ("context_overflow", ErrorType.CONTEXT_OVERFLOW),
        ("rate_limit", ErrorType.RATE_LIMITED),
        ("outage", ErrorType.UNAVAILABLE),
    ],
)
async def test_llmock_faults(llmock: LLMock, fault: str, type: ErrorType) -> None:
    client = ModelClient(settings(llmock.base_url("openai")))
    getattr(llmock, fault)()

    with pytest.raises(ModelUnavailable) as caught:
        await client.complete(MESSAGES, [], key="k")
    await client.close()

    assert caught.value.failure.type is type
