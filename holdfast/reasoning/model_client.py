"""The model client: makes one streamed chat completion at any OpenAI-compatible endpoint, without retries.

The request goes through the `openai` client (connection, headers, errors) by its documented way to raw responses,
`client.post(…, cast_to=Response)`. `chat.completions.create` would walk the parameters of the whole conversation and
build a typed object for every chunk, which costs more than the rest of a turn.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, cast

import httpx2
import openai

from holdfast.authoring.options import AS_SET, MAX_TOKENS, ModelAnswer, ModelOptions
from holdfast.authoring.services import Service
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ErrorType, Failure
from holdfast.reasoning.answers import Assembly, ModelUnavailable, chunks, rambling
from holdfast.reasoning.conversation import CUT
from holdfast.reliability.errors import classify
from holdfast.reliability.sent_keys import outside
from holdfast.settings import ModelTarget, Settings
from holdfast.telemetry.tracing import span

log = logging.getLogger(__name__)

CONNECT_S = 5.0
LIMITS = httpx2.Limits(max_connections=1000, max_keepalive_connections=200)
USUAL_OUTPUT = 500
COMPACT_TO = 500
"""Characters kept of an older tool result in a compacted conversation."""
MOST_SAID = 8_000_000
"""Most bytes of an answer's text, arguments and reasoning; the client then cuts the call."""
MOST_SENT = 16_000_000
"""Most bytes of a whole stream, or `SENT_PER_TOKEN` for each token that it may have, whichever is more."""
SENT_PER_TOKEN = 1024
RAMBLES = 40.0
"""Bytes per second, some ten tokens. A model that runs out of time at this rate or faster rambles; otherwise it is
slow."""
LEAST_TOKENS = 256
"""Least limit of an answer in tokens, however full the context window."""
MAY_REFUSE = ("max_tokens", "max_completion_tokens", "tool_choice", "temperature", "response_format", "stream_options")
"""Parameters of ours that some endpoints refuse. The client then asks again without the parameter, and omits it from
then on."""


@dataclass(frozen=True)
class Question:
    """One request to a model."""

    messages: list[Json]
    tools: list[Json]
    key: str
    """Sent as `Idempotency-Key`."""
    options: ModelOptions
    must_call: bool
    tokens: int
    """Estimated tokens of messages and tools."""


class ModelClient:
    """Calls one model. One instance per process and model pools the connections of all calls."""

    def __init__(self, settings: Settings, target: ModelTarget | None = None) -> None:
        """target: the model, by default the first of the settings."""
        target = target or settings.models[0]
        self._settings = settings
        self._target = target
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
            max_in_flight=target.max_in_flight,
        )
        """The model as a service with circuit breaker and rate limits, the same for every tenant."""
        self.usual_output = USUAL_OUTPUT
        """Expected tokens of the next answer: the longest of the last answers, decaying slowly."""
        openais = endpoint.host == "api.openai.com"
        self._no_key = not key and openais
        # OpenAI's newer models require the first name, local servers know only the second.
        self._limit_name = target.limit_name or ("max_completion_tokens" if openais else "max_tokens")
        self._refused: set[str] = set()
        """Parameters that the endpoint refuses, as learned by this process."""
        # `_stream` enforces the deadlines (for tokens, not bytes), so the transport only bounds connecting.
        timeout = httpx2.Timeout(None, connect=CONNECT_S, pool=CONNECT_S)
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",  # the client requires one, local endpoints need none
            base_url=self._url,
            max_retries=0,
            timeout=timeout,
            # A redirect would send the conversation to a host that is not configured.
            http_client=openai.DefaultAsyncHttpxClient(limits=LIMITS, timeout=timeout, follow_redirects=False),
        )

    def most(self, options: ModelOptions, asked: int = 0) -> int:
        """Returns the limit of an answer in tokens. asked: tokens of the request, which share the context window."""
        limits = [each for each in (options.max_tokens, self._target.max_tokens) if each]
        most = min(limits, default=MAX_TOKENS)
        return min(most, max(self.window - asked, LEAST_TOKENS)) if self.window else most

    async def complete(
        self,
        messages: list[Json],
        tools: list[Json],
        *,
        key: str,
        options: ModelOptions = AS_SET,
        must_call: bool = False,
    ) -> ModelAnswer:
        """Makes one model call.

        messages, tools: as in a chat completion request. key: sent as `Idempotency-Key`. must_call: the model must call
        one of the tools, if the endpoint supports it.
        Raises ModelUnavailable, and nothing else.
        """
        asked = {"gen_ai.operation.name": "chat", "gen_ai.request.model": self.model, "holdfast.key": key}
        question = Question(messages, tools, key, options, must_call, estimate(messages, tools))
        with span(f"chat {self.model}", **asked) as current:
            answer = await self._complete(question)
            self.usual_output = max(answer.usage.output_tokens, round(0.95 * self.usual_output))
            if current is not None:
                current.set_attribute("gen_ai.response.model", answer.model)
                current.set_attribute("gen_ai.usage.input_tokens", answer.usage.input_tokens)
                current.set_attribute("gen_ai.usage.output_tokens", answer.usage.output_tokens)
            return answer

    async def close(self) -> None:
        await self._client.close()

    async def _complete(self, question: Question) -> ModelAnswer:
        assembly = Assembly()
        taken = [call["id"] for each in question.messages for call in each.get("tool_calls") or ()]
        try:
            if self._no_key:
                how = "needs a key: set OPENAI_API_KEY, or OPENAI_BASE_URL for an endpoint of your own"
                raise ModelUnavailable(Failure(ErrorType.UNAUTHORIZED, how))
            await self._ask(question, assembly)
            return assembly.answer(self.model, self._url, taken)
        except Exception as error:  # noqa: BLE001 - every error is classified for the caller
            failure = classify(error)
            used = assembly.so_far(question.tokens, self.model, self._url) if assembly.started else None
            # `from None`: the original's text and request hold data that must not reach a history or a log.
            raise ModelUnavailable(replace(failure, message=f"{self._who}: {failure.message}"), used) from None

    async def _ask(self, question: Question, assembly: Assembly) -> None:
        """Sends the request, and repeats it without each parameter that the endpoint refuses."""
        end = asyncio.get_running_loop().time() + self._settings.model_total_s
        left_out = {*self._refused}
        while True:
            body = self._body(question, left_out)
            try:
                return await self._stream(body, question, assembly, end)
            except openai.APIStatusError as error:
                refused = refused_of(error, body)
                if refused is None:
                    raise
                self._adapt(refused, left_out, error)

    def _adapt(self, refused: str, left_out: set[str], error: openai.APIStatusError) -> None:
        """Switches to the other name of the token limit, or omits the parameter from now on."""
        other = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}.get(refused)
        if classify(error).type is ErrorType.CONTEXT_OVERFLOW:
            left_out |= {refused, other or ""}  # the limit is too large for this request only
            return
        if other and other not in left_out and not self._target.limit_name:
            self._limit_name = other
        else:
            self._refused.add(refused)
        left_out.add(refused)
        log.warning("%s refuses the parameter %s: it is asked without from now on", self._who, refused)

    def _body(self, question: Question, left_out: set[str]) -> Json:
        options, target = question.options, self._target
        body: Json = {
            **target.extra,
            **options.extra,
            "model": self.model,
            "messages": [_sent(each) for each in question.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            self._limit_name: self.most(options, question.tokens),
        }
        temperature = target.temperature if options.temperature is None else options.temperature
        if temperature is not None:
            body["temperature"] = temperature
        if options.schema is not None:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": options.schema},
            }
        if question.tools:
            body["tools"] = question.tools
            if question.must_call:
                body["tool_choice"] = "required"
        return {name: value for name, value in body.items() if name not in left_out}

    async def _stream(self, body: Json, question: Question, assembly: Assembly, end: float) -> None:
        """Sends the request and feeds every chunk to `assembly`, under the three deadlines, the last of them `end`."""
        limits, now = self._settings, asyncio.get_running_loop().time
        most = self.most(question.options)
        begun = now()
        try:
            async with asyncio.timeout_at(min(end, begun + limits.model_first_token_s)) as clock:
                posted = self._client.post(
                    "/chat/completions",
                    body=body,
                    cast_to=httpx2.Response,
                    options={
                        "headers": {"Idempotency-Key": outside(question.key)},
                        "security": {"bearer_auth": True},
                    },
                    stream=True,
                    stream_cls=openai.AsyncStream[Any],
                )
                # With this `cast_to` the client returns the open response, and we read it.
                response = cast(httpx2.Response, await posted)
                async with aclosing(chunks(response, max(MOST_SENT, most * SENT_PER_TOKEN))) as stream:
                    async for chunk in stream:
                        assembly.add(chunk, response.request)
                        if assembly.size > MOST_SAID:
                            raise rambling(f"said more than {MOST_SAID:,} bytes without ending: cut")
                        clock.reschedule(min(end, now() + limits.model_between_tokens_s))
        except TimeoutError:
            if now() >= end and assembly.size >= RAMBLES * (now() - begun):
                words = f"still talking after {limits.model_total_s:g} s and {assembly.size:,} bytes: cut"
                raise rambling(words) from None
            if now() >= end:
                what = f"not finished within {limits.model_total_s:g} s"
            elif assembly.started:
                what = f"silent for {limits.model_between_tokens_s:g} s in the middle of its answer"
            else:
                what = f"no first token within {limits.model_first_token_s:g} s"
            raise ModelUnavailable(Failure(ErrorType.TIMEOUT, what, retry=True, maybe_done=True)) from None


def refused_of(error: openai.APIStatusError, body: Json) -> str | None:
    """Returns the parameter of ours that the endpoint's error names as refused; None when it names none."""
    if error.status_code not in (400, 422):
        return None
    words = f"{getattr(error, 'param', None)} {error.body or error.message}"
    return next((name for name in MAY_REFUSE if name in body and re.search(rf"(?<!\w){name}(?!\w)", words)), None)


def _sent(message: Json) -> Json:
    """Returns a message without our internal keys."""
    return {name: value for name, value in message.items() if name != CUT} if CUT in message else message


def estimate(messages: list[Json], tools: list[Json]) -> int:
    """Estimates a request's tokens, on the high side: a third of its bytes as JSON (English: some 4 bytes a token)."""
    return len(json.dumps([messages, tools], ensure_ascii=False).encode()) // 3


def compacted(messages: list[Json]) -> list[Json] | None:
    """Returns the conversation with the older tool results cut short; None when there is nothing to cut.

    The answers to the last message's calls stay whole, and so do the messages of people and of the model.
    """
    last = max((n for n, each in enumerate(messages) if each["role"] == "assistant"), default=0)
    shorter = [_cut(each) if each["role"] == "tool" and n < last else each for n, each in enumerate(messages)]
    return shorter if shorter != messages else None


def _cut(message: Json) -> Json:
    text = message["content"]
    if len(text) <= COMPACT_TO:
        return message
    return {**message, "content": f"{text[:COMPACT_TO]}\n[cut: {len(text) - COMPACT_TO} more characters, read before]"}
