"""The model client: one streamed chat completion over any OpenAI-compatible endpoint, never retried here.

The request goes through the `openai` client (connection, headers, errors) by its documented door for raw responses,
`client.post(…, cast_to=Response)`. `chat.completions.create` would walk the parameters of the whole conversation and
build a typed object for every chunk, which costs more than all the rest of a turn.
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

from holdfast.answers import Assembly, ModelAnswer, ModelUnavailable, chunks, rambling
from holdfast.contracts import Json
from holdfast.conversation import CUT
from holdfast.keys import outside
from holdfast.options import AS_SET, MAX_TOKENS, ModelOptions
from holdfast.reliability.errors import ErrorType, Failure, classify
from holdfast.services import Service
from holdfast.settings import ModelTarget, Settings
from holdfast.telemetry.tracing import span

log = logging.getLogger(__name__)

CONNECT_S = 5.0
LIMITS = httpx2.Limits(max_connections=1000, max_keepalive_connections=200)
USUAL_OUTPUT = 500
COMPACT_TO = 500
"""Characters that stay of an older tool result in a compacted conversation."""
MOST_SAID = 8_000_000
"""Bytes of an answer's words and arguments, after which the model is cut."""
MOST_SENT = 16_000_000
"""Bytes of a whole stream, or `SENT_PER_TOKEN` for each token that it may have, whichever is more."""
SENT_PER_TOKEN = 1024
RAMBLES = 40.0
"""Bytes a second, some ten tokens: a model that says more but is not done in time rambles, with less it is slow."""
LEAST_TOKENS = 256
"""What is left for the answer, however full the context window."""
MAY_REFUSE = ("max_tokens", "max_completion_tokens", "tool_choice", "temperature", "response_format", "stream_options")
"""Parameters of ours that some endpoint refuses. It is asked again without, and not sent it any more."""


@dataclass(frozen=True)
class Question:
    """One request to a model."""

    messages: list[Json]
    tools: list[Json]
    key: str
    """Goes out as `Idempotency-Key`."""
    options: ModelOptions
    must_call: bool
    tokens: int
    """Of messages and tools, estimated."""


class ModelClient:
    """One per process and model: it pools the connections of all calls."""

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
        """The model as breaker and limits know it, the same for every tenant."""
        self.usual_output = USUAL_OUTPUT
        """Tokens of an answer to allow for before it is there: the longest of the last answers, slowly forgotten."""
        openais = endpoint.host == "api.openai.com"
        self._no_key = not key and openais
        # What the newer of OpenAI's models want, and what local servers know.
        self._limit_name = target.limit_name or ("max_completion_tokens" if openais else "max_tokens")
        self._refused: set[str] = set()
        """Parameters that the endpoint does not take; as long as this process lives."""
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

    def most(self, options: ModelOptions, asked: int = 0) -> int:
        """Tokens that an answer may have. asked: tokens of the request, which share the context window."""
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
        """One model call.

        messages, tools: as in a chat completion request. key: sent as `Idempotency-Key`. must_call: the model has to
        call one of the tools, where the endpoint can demand it.
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
        except Exception as error:  # noqa: BLE001 - whatever it was, callers get it classified
            failure = classify(error)
            used = assembly.so_far(question.tokens, self.model, self._url) if assembly.started else None
            # `from None`: the original's words and request hold what must not reach a history or a log.
            raise ModelUnavailable(replace(failure, message=f"{self._who}: {failure.message}"), used) from None

    async def _ask(self, question: Question, assembly: Assembly) -> None:
        """Asks, and once more without each parameter that the endpoint refuses."""
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
        """Goes by another name of the limit, or without the parameter."""
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
                # With this `cast_to` the client hands over the open response and leaves the reading to us.
                response = cast(httpx2.Response, await posted)
                async with aclosing(chunks(response, max(MOST_SENT, most * SENT_PER_TOKEN))) as stream:
                    async for chunk in stream:
                        assembly.add(chunk, response.request)
                        if assembly.size > MOST_SAID:
                            raise rambling(f"said more than {MOST_SAID:,} bytes and did not end: cut")
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
    """The parameter of ours that an endpoint refuses, as its answer names it; None when it names none."""
    if error.status_code not in (400, 422):
        return None
    words = f"{getattr(error, 'param', None)} {error.body or error.message}"
    return next((name for name in MAY_REFUSE if name in body and re.search(rf"(?<!\w){name}(?!\w)", words)), None)


def _sent(message: Json) -> Json:
    """A message without what only we have to know of it."""
    return {name: value for name, value in message.items() if name != CUT} if CUT in message else message


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
