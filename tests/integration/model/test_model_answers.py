"""Answers of careless endpoints: repaired where it is clear what is meant, else a failure that is tried again."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from holdfast.contracts.data import Json
from holdfast.contracts.failures import ErrorType
from holdfast.reasoning.model_client import ModelUnavailable
from tests.fixtures.wire import STREAM, Pause, Step, event, piece
from tests.integration.model.test_models import DONE, MESSAGES, calls, delta, failure, model, part
from tests.integration.model.test_models import ask as asked

NAN = piece(b'data: {"choices": [], "usage": {"prompt_tokens": NaN, "completion_tokens": 1}}\n\n')
HUGE = piece(b'data: {"choices": [], "usage": {"prompt_tokens": 1' + b"0" * 300 + b', "completion_tokens": 1}}\n\n')


def used(usage: Any) -> bytes:
    return event({"choices": [], "usage": usage})


@pytest.mark.parametrize(
    "usage",
    [
        used("many"),
        used([1]),
        used({"prompt_tokens": "1000", "completion_tokens": 100}),
        used({"prompt_tokens": -1, "completion_tokens": 100}),
        used({"prompt_tokens": True, "completion_tokens": 100}),
        NAN,
        HUGE,
    ],
)
async def test_usage_that_cannot_be_read_counts_as_unpriced(usage: bytes) -> None:
    done = await asked(STREAM, delta("x", "stop"), usage, DONE)
    assert (done.text, done.usage.calls, done.usage.cost_usd, done.usage.unpriced) == ("x", 1, 0, 1)


async def test_details_of_the_usage_that_cannot_be_read_cost_only_the_discount() -> None:
    done = await asked(
        STREAM,
        delta("x", "stop"),
        used({"prompt_tokens": 8, "completion_tokens": 1, "prompt_tokens_details": "x"}),
        DONE,
    )
    assert (done.usage.input_tokens, done.usage.unpriced) == (8, 0)


async def test_an_index_in_words_or_as_a_fraction() -> None:
    parts: list[Json] = [
        {**part(None, "a", "order", "{"), "index": "0"},
        {**part(None, None, None, "}"), "index": 0.0},
        {**part(None, "b", "book", "{}"), "index": "second"},
    ]
    done = await asked(STREAM, *(calls(each) for each in parts), delta(finish="tool_calls"), DONE)
    called = [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in done.message["tool_calls"]]
    assert called == [("a", "order", "{}"), ("b", "book", "{}")]


async def test_the_id_repeated_with_every_part() -> None:
    done = await asked(
        STREAM,
        calls(part(None, "a", "order", '{"n":')),
        calls(part(None, "a", None, " 1}")),
        delta(finish="tool_calls"),
        DONE,
    )
    (only,) = done.message["tool_calls"]
    assert only["function"]["arguments"] == '{"n": 1}'


async def test_arguments_as_an_object_and_content_in_parts() -> None:
    call: Json = {"index": 0, "id": "a", "function": {"name": "order", "arguments": {"n": 1}}}
    done = await asked(
        STREAM, delta(delta={"content": [{"type": "text", "text": "I order"}]}), calls(call), delta(finish="stop"), DONE
    )
    assert done.text == "I order"
    assert done.message["tool_calls"][0]["function"]["arguments"] == '{"n": 1}'


async def test_ids_are_unlike_each_other_and_those_of_the_conversation() -> None:
    """Answers to calls are matched by them, here and at the provider."""
    before: Json = {"id": "call_0", "type": "function", "function": {"name": "order", "arguments": "{}"}}
    conversation: list[Json] = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [before]},
        {"role": "tool", "tool_call_id": "call_0", "content": "ok"},
    ]
    twice = [calls(part(n, id, "order", "{}")) for n, id in enumerate(["call_0", "same", "same", None])]
    async with model(STREAM, *twice, delta(finish="tool_calls"), DONE) as (client, _):
        done = await client.complete(conversation, [], key="k")
    assert [each["id"] for each in done.message["tool_calls"]] == ["call_0_2", "same", "same_2", "call_3"]


async def test_an_answer_cut_at_its_limit_is_marked_and_half_a_call_can_be_sent_back() -> None:
    done = await asked(STREAM, calls(part(0, "a", "order", '{"item": "asp')), delta(finish="length"), DONE)
    assert done.message["cut"]
    assert done.message["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([piece(b"data: " + b'{"a":' * 50_000 + b"\n\n")], id="deep"),
        pytest.param([piece(b'data: {"n": ' + b"1" * 5000 + b"}\n\n")], id="a number of 5,000 digits"),
        pytest.param([event({"choices": [{"delta": {"content": 5}}]})], id="content a number"),
        pytest.param([event({"choices": [{"delta": "x"}]})], id="delta a text"),
        pytest.param([event({"choices": [{"delta": {"tool_calls": ["x"]}}]})], id="a call that is a text"),
        pytest.param([calls({"index": 0, "id": "a", "function": {"name": {"x": 1}}})], id="a name that is none"),
    ],
)
async def test_what_is_no_answer_is_tried_again(steps: list[Step]) -> None:
    broken = await failure(STREAM, *steps, delta("x", "stop"), DONE)
    assert (broken.type, broken.retry) == (ErrorType.BAD_RESPONSE, True)


# ------------------------------------------------------------------ without end

TOTAL = {"HOLDFAST_MODEL_TOTAL_S": 0.5}
WORDS = "and so on " * 20


async def test_a_model_that_talks_on_and_on_rambles_and_what_it_said_is_counted() -> None:
    async with model(STREAM, *[delta(WORDS), Pause(0.05)] * 40, **TOTAL) as (client, _):
        with pytest.raises(ModelUnavailable) as caught:
            await client.complete(MESSAGES, [], key="k")
    assert caught.value.failure.type is ErrorType.RAMBLING
    assert "still talking after 0.5 s" in caught.value.failure.message
    assert caught.value.usage
    assert caught.value.usage.calls == 1
    assert caught.value.usage.output_tokens >= 2 * len(WORDS) // 4
    assert caught.value.usage.cost_usd > 0


async def test_a_slow_model_is_no_rambling_one_and_is_counted_as_well() -> None:
    async with model(STREAM, *[delta("x"), Pause(0.1)] * 40, **TOTAL) as (client, _):
        with pytest.raises(ModelUnavailable) as caught:
            await client.complete(MESSAGES, [], key="k")
    assert caught.value.failure.type is ErrorType.TIMEOUT
    assert caught.value.usage and caught.value.usage.input_tokens


async def test_a_model_that_never_began_has_cost_nothing_that_is_known() -> None:
    async with model(STREAM, Pause(5), HOLDFAST_MODEL_FIRST_TOKEN_S=0.2) as (client, _):
        with pytest.raises(ModelUnavailable) as caught:
            await client.complete(MESSAGES, [], key="k")
    assert (caught.value.failure.type, caught.value.usage) == (ErrorType.TIMEOUT, None)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        pytest.param(delta("x" * 100_000), "said more than 8,000,000 bytes", id="words"),
        pytest.param(calls(part(0, arguments="x" * 100_000)), "said more than 8,000,000 bytes", id="arguments"),
        pytest.param(piece(b": " + b"x" * 100_000 + b"\n\n"), "sent more than 16,000,000 bytes", id="comments"),
        pytest.param(piece(b"x" * 100_000), "sent more than 16,000,000 bytes", id="one line"),
    ],
)
async def test_a_stream_is_cut_at_its_size_before_it_fills_the_memory(step: bytes, words: str) -> None:
    tracemalloc.start()
    try:
        endless = await failure(STREAM, *[step] * 5000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert endless.type is ErrorType.RAMBLING
    assert words in endless.message
    assert peak < 100_000_000
