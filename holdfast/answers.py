"""What a model answers: put together from a stream's chunks, repaired where endpoints are careless, and counted."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import genai_prices
import httpx2
import openai

from holdfast.contracts import Json, Usage, whole
from holdfast.conversation import CUT
from holdfast.reliability.errors import ErrorType, Failure

DRAIN_S = 0.1
SIMULATED = "simulated"
"""The `system_fingerprint` of the scripted model, so that its output can be labelled wherever it is shown."""
BYTES_PER_TOKEN = 4
"""Of English, and what a call that was cut is estimated by."""
MOST_TOKENS = 10**9
"""An endpoint that says a call used more has counted something else."""


class ModelUnavailable(Exception):
    """A model call failed; `failure` says how. Every failure of a call is one of these."""

    def __init__(self, failure: Failure, usage: Usage | None = None) -> None:
        """usage: what the call has cost all the same, because it was cut while the model answered; an estimate."""
        super().__init__(failure.message)
        self.failure = failure
        self.usage = usage


@dataclass(frozen=True)
class ModelAnswer:
    """A complete answer of a model."""

    message: Json
    """The assistant message as the endpoint takes it back: role, content or tool_calls (or both), no None fields.

    One that was cut at its limit has the key `conversation.CUT`, which is not sent.
    """
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


def bad(what: str) -> ModelUnavailable:
    return ModelUnavailable(Failure(ErrorType.BAD_RESPONSE, f"answered with {what}", True, True))


def rambling(what: str) -> ModelUnavailable:
    return ModelUnavailable(Failure(ErrorType.RAMBLING, what, True, True))


# ------------------------------------------------------------------ reading the stream


async def chunks(response: httpx2.Response, most: int) -> AsyncGenerator[Any]:
    """The JSON of each server-sent event; closes the response. Raises ModelUnavailable after `most` bytes.

    Splits at newlines itself: httpx's line reader also splits at U+2028 and its like, which JSON strings may contain.
    """
    parts = response.aiter_bytes()
    begun: list[bytes] = []
    size = 0
    try:
        async for part in parts:
            size += len(part)
            if size > most:
                raise rambling(f"sent more than {most:,} bytes and did not end: cut")
            *lines, rest = part.split(b"\n")
            if lines:
                lines[0] = b"".join([*begun, lines[0]])
                begun = []
            begun.append(rest)
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    await _drain(parts)
                    return
                try:
                    yield json.loads(data)
                except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError as well
                    raise bad(f"a chunk that is no JSON ({type(error).__name__})") from None
    finally:
        await response.aclose()


async def _drain(parts: AsyncIterator[bytes]) -> None:
    """Reads what is left after the last event: only then can the connection be used again. Nothing there can fail."""
    with suppress(TimeoutError, httpx2.TransportError):
        async with asyncio.timeout(DRAIN_S):
            async for _ in parts:
                pass


# ------------------------------------------------------------------ putting it together


@dataclass
class Assembly:
    """Puts the chunks of a stream together."""

    content: list[str] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    calls: dict[int, Json] = field(default_factory=dict)
    model: str = ""
    finish_reason: str = ""
    usage: Any = None
    simulated: bool = False
    started: bool = False
    size: int = 0
    """Bytes of what the model has said so far: words, arguments, thoughts."""

    def add(self, chunk: Any, request: httpx2.Request) -> None:
        """Raises openai's APIError for an error event, ModelUnavailable for a chunk that is none."""
        self.started = True
        try:
            if error := chunk.get("error"):
                body = error if isinstance(error, dict) else {"message": str(error)}
                raise openai.APIError(str(body.get("message") or "error in the stream"), request, body=body)
            self.model = str(chunk.get("model") or self.model)
            self.usage = chunk.get("usage") or self.usage
            self.simulated = self.simulated or chunk.get("system_fingerprint") == SIMULATED
            for choice in chunk.get("choices") or ():
                self.finish_reason = str(choice.get("finish_reason") or self.finish_reason)
                delta = choice.get("delta") or {}
                self._say(self.content, delta.get("content"))
                self._say(self.refusal, delta.get("refusal"))
                # Not kept, but paid for: reasoning as several servers name it.
                self._say([], delta.get("reasoning_content") or delta.get("reasoning"))
                for part in delta.get("tool_calls") or ():
                    self._add_call(part)
        except (AttributeError, KeyError, TypeError) as error:
            raise bad(f"a chunk that is none ({error})") from None

    def _say(self, kept: list[str], said: Any) -> None:
        if isinstance(said, list):  # content in parts
            said = "".join(part["text"] for part in said if part.get("type", "text") == "text")
        if said:
            self.size += len(said.encode(errors="replace"))
            kept.append(said)

    def _add_call(self, part: Json) -> None:
        id, function = str(part.get("id") or ""), part.get("function") or {}
        call = self.calls.setdefault(
            self._index(part.get("index"), id, function),
            {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
        )
        call["id"] = id or call["id"]
        call["function"]["name"] += function.get("name") or ""
        arguments = function.get("arguments") or ""
        if not isinstance(arguments, str):  # the object itself
            arguments = json.dumps(arguments, ensure_ascii=False)
        call["function"]["arguments"] += arguments
        self.size += len(arguments.encode(errors="replace"))

    def _index(self, index: Any, id: str, function: Json) -> int:
        """Which call a part belongs to.

        Some endpoints send no index, or none that is a number. There a part with an id begins a call, and the others go
        on with it; so does a part that repeats the id and names no function.
        """
        if isinstance(index, str) and index.strip().isdecimal():
            index = int(index)
        if isinstance(index, int | float) and not isinstance(index, bool) and index == index // 1:
            return int(index)
        last = max(self.calls, default=-1)
        goes_on = last >= 0 and (not id or (id == self.calls[last]["id"] and not function.get("name")))
        return last if goes_on else last + 1

    def answer(self, model: str, url: str, taken: Sequence[str] = ()) -> ModelAnswer:
        """The answer, its call ids unlike each other and unlike those `taken` by the conversation.

        Raises ModelUnavailable when the stream ended too early or was cut by a content filter.
        """
        if not self.started:
            raise bad("no event stream")
        if not self.finish_reason:
            raise bad("a stream that ended before its answer did")
        if self.finish_reason == "content_filter":
            raise ModelUnavailable(Failure(ErrorType.CONTENT_POLICY, "cut off by the content filter"))
        message: Json = {"role": "assistant"}
        if self.content or not (self.calls or self.refusal):
            message["content"] = whole("".join(self.content))
        if self.refusal:
            message["refusal"] = whole("".join(self.refusal))
        if self.calls:
            message["tool_calls"] = _unlike([self.calls[index] for index in sorted(self.calls)], taken)
        if self.finish_reason == "length":
            message[CUT] = True
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = _or_none(call["function"]["arguments"])
        name = self.model or model
        usage = count(self.usage, name, url, free=self.simulated)
        return ModelAnswer(message, name, usage, self.finish_reason, self.simulated)

    def so_far(self, asked: int, model: str, url: str) -> Usage:
        """What a call that was cut has used: as the endpoint said, else estimated. asked: tokens of the request."""
        known = count(self.usage, self.model or model, url, free=self.simulated)
        if known.input_tokens or known.output_tokens:
            return known
        estimated = {"prompt_tokens": asked, "completion_tokens": self.size // BYTES_PER_TOKEN}
        return count(estimated, self.model or model, url, free=self.simulated)


def _or_none(arguments: str) -> str:
    """Arguments that were cut are no JSON, and endpoints that read the conversation fail at them."""
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        return "{}"
    return arguments


def _unlike(calls: list[Json], taken: Sequence[str]) -> list[Json]:
    """The calls under ids that occur once: an answer is matched to its call by them."""
    seen = {*taken}
    for number, call in enumerate(calls):
        wanted = id = whole(call["id"]) or f"call_{number}"
        again = 1
        while id in seen:
            again += 1
            id = f"{wanted}_{again}"
        seen.add(id)
        call["id"] = id
        call["function"] = {name: whole(text) for name, text in call["function"].items()}
    return calls


# ------------------------------------------------------------------ what it costs


def count(usage: Any, model: str, url: str, *, free: bool = False) -> Usage:
    """Usage and price of one call. Without usage that can be read, or for a model of no known price: unpriced."""
    usage = usage if isinstance(usage, dict) else {}
    read, written = _number(usage.get("prompt_tokens")), _number(usage.get("completion_tokens"))
    known = usage and read is not None and written is not None
    details = usage.get("prompt_tokens_details")
    cached = min(read or 0, _number(details.get("cached_tokens") if isinstance(details, dict) else 0) or 0)
    tokens = genai_prices.Usage(input_tokens=read, output_tokens=written, cache_read_tokens=cached)
    price = 0.0 if free and known else _price(tokens, model, url) if known else None
    return Usage(
        calls=1,
        input_tokens=read or 0,
        output_tokens=written or 0,
        cost_usd=price or 0.0,
        unpriced=1 if price is None else 0,
    )


def _number(value: Any) -> int | None:
    """A count of tokens; 0 when nothing was said of it, None when what was said is none."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if 0 <= value <= MOST_TOKENS else None


def _price(tokens: genai_prices.Usage, model: str, url: str) -> float | None:
    """USD by the prices of the endpoint, else (your own gateway) by those of the maker of a model with this name."""
    for endpoint in (url, None):
        try:
            return float(genai_prices.calc_price(tokens, model, provider_api_url=endpoint).total_price)
        except LookupError:
            continue
    return None
