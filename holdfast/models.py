"""The model client: one streamed chat completion over any OpenAI-compatible endpoint, never retried here.

The request goes through the `openai` client (connection, headers, errors) by its documented door for raw responses,
`client.post(…, cast_to=Response)`. `chat.completions.create` would walk the parameters of the whole conversation and
build a typed object for every chunk, which costs more than all the rest of a turn.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import genai_prices
import httpx2
import openai

from holdfast.contracts import Json, Usage, whole
from holdfast.reliability.errors import ErrorType, Failure, classify
from holdfast.services import Service
from holdfast.settings import ModelTarget, Settings
from holdfast.telemetry.tracing import span

CONNECT_S = 5.0
DRAIN_S = 0.1
LIMITS = httpx2.Limits(max_connections=1000, max_keepalive_connections=200)
USUAL_OUTPUT = 500
COMPACT_TO = 500
"""Characters that stay of an older tool result in a compacted conversation."""
SIMULATED = "simulated"
"""The `system_fingerprint` of the scripted model, so that its output can be labelled wherever it is shown."""


class ModelUnavailable(Exception):
    """A model call failed; `failure` says how. Every failure of a call is one of these."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True)
class ModelAnswer:
    """A complete answer of a model."""

    message: Json
    """The assistant message as the endpoint takes it back: role, content or tool_calls (or both), no None fields."""
    model: str
    """As the endpoint names it."""
    usage: Usage
    finish_reason: str
    """`stop`, `tool_calls` or `length` (cut off)."""
    simulated: bool = False
    origin: str = ""
    """Why it was not the first model that answered; empty when it was."""

    @property
    def label(self) -> str:
        """The model's name as people read it: a simulated one says so."""
        return f"{self.model} (simulated)" if self.simulated else self.model

    @property
    def text(self) -> str:
        """What the model said in words: content, or its refusal."""
        return self.message.get("content") or self.message.get("refusal") or ""

    def to_json(self) -> Json:
        return {
            "message": self.message,
            "model": self.model,
            "usage": self.usage.model_dump(mode="json"),
            "finish_reason": self.finish_reason,
            "simulated": self.simulated,
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, value: Json) -> ModelAnswer:
        return cls(**{**value, "usage": Usage.model_validate(value["usage"])})


class ModelClient:
    """One per process and model: it pools the connections of all calls."""

    def __init__(self, settings: Settings, target: ModelTarget | None = None) -> None:
        """target: the model, by default the first of the settings."""
        target = target or settings.models[0]
        self._settings = settings
        self.model = target.model
        self.window = target.window
        self._url = target.base_url or settings.openai_base_url
        key = settings.openai_api_key.get_secret_value().strip()
        if target.base_url:  # another endpoint must not get the first one's key
            key = os.environ.get(target.key_env, "").strip() if target.key_env else ""
        endpoint = httpx2.URL(self._url)
        self._who = f"model {self.model} at {endpoint.scheme}://{endpoint.netloc.decode()}"
        self.service = Service(
            f"model {self.model} at {endpoint.netloc.decode()}",
            requests_per_minute=target.requests_per_minute,
            tokens_per_minute=target.tokens_per_minute,
        )
        """The model as breaker and limits know it, the same for every tenant."""
        self.usual_output = USUAL_OUTPUT
        """Tokens of an answer to allow for before it is there: the longest of the last answers, slowly forgotten."""
        self._no_key = not key and endpoint.host == "api.openai.com"
        # The deadlines of A10 are ours (tokens, not bytes), so the transport only bounds the connection.
        timeout = httpx2.Timeout(None, connect=CONNECT_S, pool=CONNECT_S)
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",  # the client insists on one; local endpoints want none
            base_url=self._url,
            max_retries=0,
            timeout=timeout,
            # A redirect would carry the conversation to a host that nobody has named.
            http_client=openai.DefaultAsyncHttpxClient(limits=LIMITS, timeout=timeout, follow_redirects=False),
        )

    async def complete(self, messages: list[Json], tools: list[Json], *, key: str) -> ModelAnswer:
        """One model call.

        messages, tools: as in a chat completion request. key: sent as `Idempotency-Key`.
        Raises ModelUnavailable, and nothing else.
        """
        asked = {"gen_ai.operation.name": "chat", "gen_ai.request.model": self.model, "holdfast.key": key}
        with span(f"chat {self.model}", **asked) as current:
            answer = await self._complete(messages, tools, key)
            self.usual_output = max(answer.usage.output_tokens, round(0.95 * self.usual_output))
            if current is not None:
                current.set_attribute("gen_ai.response.model", answer.model)
                current.set_attribute("gen_ai.usage.input_tokens", answer.usage.input_tokens)
                current.set_attribute("gen_ai.usage.output_tokens", answer.usage.output_tokens)
            return answer

    async def close(self) -> None:
        await self._client.close()

    async def _complete(self, messages: list[Json], tools: list[Json], key: str) -> ModelAnswer:
        assembly = _Assembly()
        try:
            if self._no_key:
                how = "needs a key: set OPENAI_API_KEY, or OPENAI_BASE_URL for an endpoint of your own"
                raise ModelUnavailable(Failure(ErrorType.UNAUTHORIZED, how))
            await self._stream(messages, tools, key, assembly)
            return assembly.answer(self.model, self._url)
        except Exception as error:  # noqa: BLE001 - whatever it was, callers get it classified
            failure = classify(error)
            # `from None`: the original's words and request hold what must not reach a history or a log.
            raise ModelUnavailable(replace(failure, message=f"{self._who}: {failure.message}")) from None

    async def _stream(self, messages: list[Json], tools: list[Json], key: str, assembly: _Assembly) -> None:
        """Sends the request and feeds every chunk to `assembly`, under the three deadlines."""
        limits, now = self._settings, asyncio.get_running_loop().time
        body: Json = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if tools:
            body["tools"] = tools
        end = now() + limits.model_total_s
        try:
            async with asyncio.timeout_at(min(end, now() + limits.model_first_token_s)) as clock:
                posted = self._client.post(
                    "/chat/completions",
                    body=body,
                    cast_to=httpx2.Response,
                    options={"headers": {"Idempotency-Key": key}, "security": {"bearer_auth": True}},
                    stream=True,
                    stream_cls=openai.AsyncStream[Any],
                )
                # With this `cast_to` the client hands over the open response and leaves the reading to us.
                response = cast(httpx2.Response, await posted)
                async with aclosing(_chunks(response)) as chunks:
                    async for chunk in chunks:
                        assembly.add(chunk, response.request)
                        clock.reschedule(min(end, now() + limits.model_between_tokens_s))
        except TimeoutError:
            if now() >= end:
                what = f"not finished within {limits.model_total_s:g} s"
            elif assembly.started:
                what = f"silent for {limits.model_between_tokens_s:g} s in the middle of its answer"
            else:
                what = f"no first token within {limits.model_first_token_s:g} s"
            raise ModelUnavailable(Failure(ErrorType.TIMEOUT, what, retry=True, maybe_done=True)) from None


async def _chunks(response: httpx2.Response) -> AsyncGenerator[Any]:
    """The JSON of each server-sent event; closes the response.

    Splits at newlines itself: httpx's line reader also splits at U+2028 and its like, which JSON strings may contain.
    """
    parts = response.aiter_bytes()
    rest = b""
    try:
        async for part in parts:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    await _drain(parts)
                    return
                yield json.loads(data)
    finally:
        await response.aclose()


async def _drain(parts: AsyncIterator[bytes]) -> None:
    """Reads what is left after the last event: only then can the connection be used again. Nothing there can fail."""
    with suppress(TimeoutError, httpx2.TransportError):
        async with asyncio.timeout(DRAIN_S):
            async for _ in parts:
                pass


@dataclass
class _Assembly:
    """Puts the chunks of a stream together."""

    content: list[str] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    calls: dict[int, Json] = field(default_factory=dict)
    model: str = ""
    finish_reason: str = ""
    usage: Json | None = None
    simulated: bool = False
    started: bool = False

    def add(self, chunk: Any, request: httpx2.Request) -> None:
        """Raises openai's APIError for an error event, ModelUnavailable for a chunk that is none."""
        self.started = True
        try:
            if error := chunk.get("error"):
                body = error if isinstance(error, dict) else {"message": str(error)}
                raise openai.APIError(str(body.get("message") or "error in the stream"), request, body=body)
            self.model = chunk.get("model") or self.model
            self.usage = chunk.get("usage") or self.usage
            self.simulated = self.simulated or chunk.get("system_fingerprint") == SIMULATED
            for choice in chunk.get("choices") or ():
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                delta = choice.get("delta") or {}
                if text := delta.get("content"):
                    self.content.append(text)
                if text := delta.get("refusal"):
                    self.refusal.append(text)
                for part in delta.get("tool_calls") or ():
                    self._add_call(part)
        except (AttributeError, KeyError, TypeError) as error:
            raise _bad(f"a chunk that is none ({error})") from None

    def _add_call(self, part: Json) -> None:
        # Some compatible endpoints send no index; there a part with an id begins a call and the others go on with it.
        index = part.get("index")
        if index is None:
            index = len(self.calls) - (0 if part.get("id") else 1)
        call = self.calls.setdefault(index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call["id"] = part.get("id") or call["id"]
        function = part.get("function") or {}
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""

    def answer(self, model: str, url: str) -> ModelAnswer:
        """Raises ModelUnavailable when the stream ended too early or was cut by a content filter."""
        if not self.started:
            raise _bad("no event stream")
        if not self.finish_reason:
            raise _bad("a stream that ended before its answer did")
        if self.finish_reason == "content_filter":
            raise ModelUnavailable(Failure(ErrorType.CONTENT_POLICY, "cut off by the content filter"))
        message: Json = {"role": "assistant"}
        if self.content or not (self.calls or self.refusal):
            message["content"] = whole("".join(self.content))
        if self.refusal:
            message["refusal"] = whole("".join(self.refusal))
        if self.calls:
            for call in self.calls.values():
                call["function"] = {name: whole(text) for name, text in call["function"].items()}
            message["tool_calls"] = [self.calls[index] for index in sorted(self.calls)]
        name = self.model or model
        usage = count(self.usage, name, url, free=self.simulated)
        return ModelAnswer(message, name, usage, self.finish_reason, self.simulated)


def estimate(messages: list[Json], tools: list[Json]) -> int:
    """Tokens of a request, estimated high: a third of its bytes of JSON (English has about 4 bytes a token)."""
    return len(json.dumps([messages, tools], ensure_ascii=False).encode()) // 3


def compacted(messages: list[Json]) -> list[Json] | None:
    """The conversation with the older tool results cut short; None when there is nothing to cut.

    The results that the last answer waits for stay whole, and so does what people and the model said.
    """
    last = max((n for n, each in enumerate(messages) if each["role"] == "assistant"), default=0)
    shorter = [_cut(each) if each["role"] == "tool" and n < last else each for n, each in enumerate(messages)]
    return shorter if shorter != messages else None


def _cut(message: Json) -> Json:
    text = message["content"]
    if len(text) <= COMPACT_TO:
        return message
    return {**message, "content": f"{text[:COMPACT_TO]}\n[cut: {len(text) - COMPACT_TO} more characters, read before]"}


def count(usage: Json | None, model: str, url: str, *, free: bool = False) -> Usage:
    """Usage and price of one call. Without usage, or for a model of no known price, the call counts as unpriced."""
    usage = usage or {}
    read, written = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = min(read, (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    tokens = genai_prices.Usage(input_tokens=read, output_tokens=written, cache_read_tokens=cached)
    price = 0.0 if free else _price(tokens, model, url) if usage else None
    return Usage(
        calls=1, input_tokens=read, output_tokens=written, cost_usd=price or 0.0, unpriced=1 if price is None else 0
    )


def _price(tokens: genai_prices.Usage, model: str, url: str) -> float | None:
    """USD by the prices of the endpoint, else (a gateway of one's own) of whoever makes a model of this name."""
    for endpoint in (url, None):
        try:
            return float(genai_prices.calc_price(tokens, model, provider_api_url=endpoint).total_price)
        except LookupError:
            continue
    return None


def _bad(what: str) -> ModelUnavailable:
    return ModelUnavailable(Failure(ErrorType.BAD_RESPONSE, f"answered with {what}", True, True))
