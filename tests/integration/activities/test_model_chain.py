"""Down the chain of models, over real HTTP: who is asked when one is gone, full, too small or unwilling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.responses import Response, StreamingResponse

from activities.model import Wanted, ask_model, spent
from holdfast.authoring.options import ModelAnswer
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ErrorType
from holdfast.engine.runtime import Runtime, open_runtime
from holdfast.reasoning.answers import ModelUnavailable
from holdfast.reasoning.model_client import estimate
from holdfast.reliability.chain import RetryLater
from holdfast.reliability.ledger import State
from holdfast.reliability.waiting import NotYet
from holdfast.settings import ModelTarget, Settings
from holdfast.testing.model import FakeModel, error, say

KEY = "wf/run/turn-1"
SHORT: list[Json] = [{"role": "user", "content": "Discharge pat-1"}]
LONG: list[Json] = [
    *SHORT,
    {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "r", "arguments": ""}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "x" * 6000},
    {"role": "assistant", "content": "read"},
    {"role": "user", "content": "go on"},
]
"""A conversation that can be compacted: the result of a tool was read long ago."""


@dataclass
class Chain:
    """Two models: `first` is asked, `other` stands in."""

    runtime: Runtime
    first: FakeModel
    other: FakeModel

    @property
    def asked(self) -> tuple[int, int]:
        return len(self.first.requests), len(self.other.requests)

    async def ask(self, messages: list[Json] = SHORT, key: str = KEY) -> ModelAnswer:
        """One attempt of the turn's model call."""
        call: dict[str, Any] = {"key": key, "key_base": "wf/run", "name": "turn-1", "digest": "asked", "timeout_s": 10}
        return await ask_model(self.runtime, Wanted(messages, []), **call)

    async def trip(self, n: int) -> None:
        await self.runtime.guards.breaker.trip(self.runtime.models[n].service.name, "for the test", "ada")

    async def kept(self) -> dict[str, State]:
        return {e.key: e.state for e in await self.runtime.ledger.entries("wf/run")}


@asynccontextmanager
async def chain(url: str, *, window: int | None = None, other: int | None = None, **more: Any) -> AsyncIterator[Chain]:
    """window, other: context windows of the two models, in tokens."""
    async with FakeModel.serve() as first, FakeModel.serve() as second:
        first.script, second.script = (lambda _: say("by the first")), (lambda _: say("by the other"))
        runtime = await open_runtime(
            Settings(
                database_url=url,
                openai_base_url=first.url,
                openai_api_key=SecretStr("test"),
                model="fake-1",
                model_window=window,
                model_fallbacks=(ModelTarget(model="fake-2", base_url=second.url, window=other),),
                **more,
            )
        )
        try:
            yield Chain(runtime, first, second)
        finally:
            await runtime.close()


def refuses(status: int, code: str = "") -> Any:
    def script(messages: list[Json]) -> Response:
        return error(status, code)

    return script


async def test_a_model_that_is_well_is_the_only_one_asked(store_url: str) -> None:
    async with chain(store_url) as models:
        answer = await models.ask()
        assert (answer.text, answer.origin, models.asked) == ("by the first", "", (1, 0))


async def test_when_the_first_fails_on_and_on_the_other_answers_and_says_why(store_url: str) -> None:
    async with chain(store_url) as models:
        models.first.script = refuses(503)
        for _ in range(3):
            with pytest.raises(RetryLater):
                await models.ask()
        answer = await models.ask()
        assert models.asked == (3, 1), "its breaker is open by then"
        assert answer.text == "by the other"
        assert answer.origin.startswith("in place of fake-1: ")
        assert "does not answer" in answer.origin


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_failure_that_no_retry_helps_goes_to_the_other_at_once(store_url: str, status: int) -> None:
    async with chain(store_url) as models:
        models.first.script = refuses(status)
        answer = await models.ask()
        assert (answer.text, models.asked) == ("by the other", (1, 1))
        assert f"answered {status}" in answer.origin


async def test_the_answer_is_kept_under_the_turns_own_key_whoever_gave_it(store_url: str) -> None:
    async with chain(store_url) as models:
        await models.trip(0)
        answer = await models.ask()
        await models.runtime.guards.breaker.reset(models.runtime.models[0].service.name, "ada")
        again = await models.ask()
        assert again.message == answer.message
        assert models.asked == (0, 1)
        assert await models.kept() == {KEY: State.DONE}
        assert [key for key, _ in models.other.requests] == [f"{KEY}/fb-1"]


async def test_while_all_breakers_are_open_nobody_is_asked_and_the_turn_waits(store_url: str) -> None:
    async with chain(store_url) as models:
        await models.trip(0)
        await models.trip(1)
        with pytest.raises(NotYet) as caught:
            await models.ask()
        assert caught.value.service in {model.service.name for model in models.runtime.models}
        assert (models.asked, await models.kept()) == ((0, 0), {})


async def test_a_rate_limit_of_the_first_sends_nobody_to_the_other(store_url: str) -> None:
    async with chain(store_url, model_rpm=1) as models:
        await models.runtime.guards.limiter.take(limit_of(models), "another run's call", 0)
        with pytest.raises(NotYet) as caught:
            await models.ask()
        assert (caught.value.service, models.asked) == ("", (0, 0))


def limit_of(models: Chain) -> Any:
    limit = models.runtime.models[0].service.limit("default")
    assert limit is not None
    return limit


async def test_when_none_can_answer_the_turn_hears_what_was_wrong_with_the_first(store_url: str) -> None:
    async with chain(store_url) as models:
        models.first.script, models.other.script = refuses(401), refuses(404)
        with pytest.raises(ModelUnavailable) as caught:
            await models.ask()
        assert caught.value.failure.type is ErrorType.UNAUTHORIZED
        assert models.asked == (1, 1)


@pytest.mark.parametrize("code", ["content_filter", "content_policy_violation"])
async def test_after_a_refusal_by_policy_nobody_else_is_asked(store_url: str, code: str) -> None:
    async with chain(store_url, window=1_000, other=100_000) as models:
        models.first.script = refuses(400, code)
        with pytest.raises(ModelUnavailable) as caught:
            await models.ask()
        assert caught.value.failure.type is ErrorType.CONTENT_POLICY
        assert models.asked == (1, 0)


# ------------------------------------------------------------ too long


async def test_a_conversation_that_is_known_not_to_fit_goes_to_the_larger_window_unasked(store_url: str) -> None:
    async with chain(store_url, window=1_000, other=100_000) as models:
        answer = await models.ask(LONG)
        assert (answer.text, models.asked) == ("by the other", (0, 1))
        assert models.other.requests[0][1] == LONG, "nothing is cut while a model takes it whole"
        assert f"some {estimate(LONG, [])} tokens and fake-1 takes 1000" in answer.origin


async def test_a_model_that_says_it_is_too_long_is_not_asked_twice(store_url: str) -> None:
    async with chain(store_url, other=100_000) as models:
        models.first.script = refuses(400, "context_length_exceeded")
        answer = await models.ask(LONG)
        assert (answer.text, models.asked) == ("by the other", (1, 1))


@pytest.mark.parametrize("other", [None, 4_000])
async def test_without_a_larger_window_the_conversation_is_compacted(store_url: str, other: int | None) -> None:
    async with chain(store_url, window=4_000, other=other) as models:

        def too_long(messages: list[Json]) -> Any:
            return refuses(400, "context_length_exceeded")(messages) if messages == LONG else say("to the short one")

        models.first.script = models.other.script = too_long
        answer = await models.ask(LONG)
        assert (answer.text, models.asked) == ("to the short one", (2, 0))
        assert "compacted" in answer.origin
        whole, shorter = (messages for _, messages in models.first.requests)
        assert whole == LONG
        assert [m["role"] for m in shorter] == [m["role"] for m in LONG]
        assert "[cut: 5500 more characters, read before]" in shorter[2]["content"]
        paid = [key for key, _ in models.first.requests]
        again = await models.ask(LONG)
        assert again.message == answer.message
        assert [key for key, _ in models.first.requests].count(paid[1]) == 1, "the answer is paid once"


async def test_a_conversation_with_nothing_to_cut_is_given_up(store_url: str) -> None:
    async with chain(store_url) as models:
        models.first.script = refuses(400, "context_length_exceeded")
        with pytest.raises(ModelUnavailable) as caught:
            await models.ask(SHORT)
        assert caught.value.failure.type is ErrorType.CONTEXT_OVERFLOW
        assert models.asked == (1, 0)


def garbled(messages: list[Json]) -> Response:
    return Response(b'data: {"choices": [\n\n', media_type="text/event-stream")


async def test_garbled_answers_to_one_run_do_not_close_the_model_to_all(store_url: str) -> None:
    async with chain(store_url) as models:
        models.first.script = garbled
        for _ in range(5):
            with pytest.raises(RetryLater):
                await models.ask()
        answer = await models.ask()
        assert answer.text == "by the other", "its retries are used up"
        models.first.script = lambda _: say("well")
        answer = await models.ask(key="wf/another/turn-1")
        assert (answer.text, answer.origin) == ("well", "")


async def test_garbled_answers_to_three_runs_do(store_url: str) -> None:
    async with chain(store_url) as models:
        models.first.script = garbled
        for n in range(3):
            with pytest.raises(RetryLater):
                await models.ask(key=f"wf/{n}/turn-1")
        assert "does not answer" in (await models.ask()).origin


async def test_a_rambling_model_is_asked_three_times_then_the_other_model(store_url: str) -> None:
    async with chain(store_url) as models:
        models.first.script = lambda _: Response(
            b"".join(b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % (b"on" * 500_000) for _ in range(9)),
            media_type="text/event-stream",
        )
        for _ in range(2):
            with pytest.raises(RetryLater):
                await models.ask()
        answer = await models.ask()
        assert (answer.text, models.asked) == ("by the other", (3, 1))
        assert "This happened 3 times" in answer.origin
        used = await spent(models.runtime, "wf/run", KEY)
        assert used.calls == 4
        assert used.output_tokens > 3 * 1_000_000
        rows = await models.runtime.guards.breaker.rows()
        assert not [each for each in rows if each.state == "open"]


async def test_a_bogus_retry_after_pauses_nobody_and_a_long_one_five_minutes(store_url: str) -> None:
    async with chain(store_url) as models:
        models.first.script = lambda _: error(429, retry_after="99999999")
        with pytest.raises(RetryLater) as caught:
            await models.ask()
        assert caught.value.delay < 2
        models.first.script = lambda _: error(429, retry_after="3600")
        with pytest.raises(RetryLater) as caught:
            await models.ask()
        assert caught.value.delay == 60, "it comes back to see whether a person has ended the pause"
        (row,) = await models.runtime.guards.breaker.rows()
        assert row.paused_until is not None
        assert 200 < row.paused_until - await models.runtime.guards.clock.now() <= 300


async def test_who_waits_for_a_pause_looks_every_minute_and_goes_on_after_a_reset(store_url: str) -> None:
    async with chain(store_url) as models:
        breaker, name = models.runtime.guards.breaker, models.runtime.models[0].service.name
        await models.trip(1)
        await breaker.pause(name, 300)
        with pytest.raises(NotYet) as caught:
            await models.ask()
        assert caught.value.delay <= 61
        await breaker.reset(name, "ada")
        assert (await models.ask()).text == "by the first"


async def test_a_model_with_one_slot_gets_one_request_at_a_time_and_no_breaker_opens(store_url: str) -> None:
    """Four documents at once; a request that finds the slot taken would time out."""
    at_once: list[int] = []
    under_way = 0

    def busy(messages: list[Json]) -> Response:
        async def body() -> AsyncIterator[bytes]:
            nonlocal under_way
            under_way += 1
            at_once.append(under_way)
            yield b'data: {"choices": [{"delta": {"content": "fine"}}]}\n\n'
            await asyncio.sleep(0.1)
            under_way -= 1
            yield b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'

        return StreamingResponse(body(), media_type="text/event-stream")

    async with chain(store_url, model_concurrency=1) as models:
        models.first.script = busy
        answers = await asyncio.gather(*(models.ask(key=f"wf/{n}/turn-1") for n in range(4)))
        assert [each.text for each in answers] == ["fine"] * 4
        assert at_once == [1] * 4
        assert models.asked == (4, 0)
        again = await models.ask(key="wf/0/turn-1")
        assert (again.text, models.asked) == ("fine", (4, 0)), "what is recorded needs no place"


async def test_who_finds_no_place_for_long_waits_on_a_timer_and_sends_nobody_to_the_other(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.reliability.in_flight.QUEUE_S", 0.2)
    async with chain(store_url, model_concurrency=1) as models:
        model = models.runtime.models[0]
        limit = model.service.in_flight("default")
        assert limit is not None
        async with models.runtime.guards.places.held(limit, "another run's call"):
            with pytest.raises(NotYet, match="1 calls in flight, which is its limit") as caught:
                await models.ask()
            assert (caught.value.service, models.asked) == ("", (0, 0))
            assert 1 <= caught.value.delay <= 60
        assert (await models.ask()).text == "by the first"
