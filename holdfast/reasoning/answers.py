"""Assembles a model's answer from the chunks of a stream, repairs what endpoints get wrong, and counts its usage."""

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

from holdfast.authoring.options import ModelAnswer
from holdfast.contracts.data import Json, whole
from holdfast.contracts.failures import ErrorType, Failure
from holdfast.contracts.turn import Usage
from holdfast.reasoning.conversation import CUT

DRAIN_S = 0.1
SIMULATED = "simulated"
"""The `system_fingerprint` of the scripted model; its output is labelled wherever it is shown."""
BYTES_PER_TOKEN = 4
"""Bytes of an English token, to estimate the usage of a call that was cut."""
MOST_TOKENS = 10**9
"""Upper bound of a plausible token count: an endpoint that reports more has counted something else."""


class ModelUnavailable(Exception):
    """A model call failed; `failure` says how. Every failed model call raises this."""

    def __init__(self, failure: Failure, usage: Usage | None = None) -> None:
        """usage: the estimated usage of a call that was cut while the model answered."""
        super().__init__(failure.message)
        self.failure = failure
        self.usage = usage


def bad(what: str) -> ModelUnavailable:
    return ModelUnavailable(Failure(ErrorType.BAD_RESPONSE, f"answered with {what}", True, True))


def rambling(what: str) -> ModelUnavailable:
    return ModelUnavailable(Failure(ErrorType.RAMBLING, what, True, True))


# ------------------------------------------------------------------ reading the stream


async def chunks(response: httpx2.Response, most: int) -> AsyncGenerator[Any]:
    """Yields the JSON of each server-sent event and closes the response. Raises ModelUnavailable after `most` bytes.

    It splits lines itself: httpx's line reader also splits at U+2028 and the like, which JSON strings may contain.
    """
    parts = response.aiter_bytes()
    begun: list[bytes] = []
    size = 0
    try:
        async for part in parts:
            size += len(part)
            if size > most:
                raise rambling(f"sent more than {most:,} bytes without ending: cut")
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
                    raise bad(f"a chunk that is not JSON ({type(error).__name__})") from None
    finally:
        await response.aclose()


async def _drain(parts: AsyncIterator[bytes]) -> None:
    """Reads the rest after the last event, so that the connection can be used again. Ignores errors."""
    with suppress(TimeoutError, httpx2.TransportError):
        async with asyncio.timeout(DRAIN_S):
            async for _ in parts:
                pass


# ------------------------------------------------------------------ putting it together


@dataclass
class Assembly:
    """Assembles the chunks of a stream."""

    content: list[str] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    calls: dict[int, Json] = field(default_factory=dict)
    model: str = ""
    finish_reason: str = ""
    usage: Any = None
    simulated: bool = False
    started: bool = False
    size: int = 0
    """Bytes of the model's output so far: text, arguments, reasoning."""

    def add(self, chunk: Any, request: httpx2.Request) -> None:
        """Adds a chunk. Raises openai's APIError for an error event, ModelUnavailable for a malformed chunk."""
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
                # Reasoning, under the names that several servers use: not kept, but paid for.
                self._say([], delta.get("reasoning_content") or delta.get("reasoning"))
                for part in delta.get("tool_calls") or ():
                    self._add_call(part)
        except (AttributeError, KeyError, TypeError) as error:
            raise bad(f"a malformed chunk ({error})") from None

    def _say(self, kept: list[str], said: Any) -> None:
        if isinstance(said, list):  # content as a list of parts
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
        if not isinstance(arguments, str):  # some endpoints send the object instead of its JSON text
            arguments = json.dumps(arguments, ensure_ascii=False)
        call["function"]["arguments"] += arguments
        self.size += len(arguments.encode(errors="replace"))

    def _index(self, index: Any, id: str, function: Json) -> int:
        """Returns the index of the call that a part belongs to.

        Some endpoints send no index, or one that is not a number. There a part with a new id starts a call; a part
        without an id, or with the same id and no function name, continues the last call.
        """
        if isinstance(index, str) and index.strip().isdecimal():
            index = int(index)
        if isinstance(index, int | float) and not isinstance(index, bool) and index == index // 1:
            return int(index)
        last = max(self.calls, default=-1)
        goes_on = last >= 0 and (not id or (id == self.calls[last]["id"] and not function.get("name")))
        return last if goes_on else last + 1

    def answer(self, model: str, url: str, taken: Sequence[str] = ()) -> ModelAnswer:
        """Returns the answer. Its call ids are unique, also among those `taken` by the conversation.

        Raises ModelUnavailable when the stream ended too early or a content filter cut it.
        """
        if not self.started:
            raise bad("no event stream")
        if not self.finish_reason:
            raise bad("a stream that ended before the answer was complete")
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
        """Returns the usage of a call that was cut: the endpoint's figures, else an estimate. asked: request tokens."""
        known = count(self.usage, self.model or model, url, free=self.simulated)
        if known.input_tokens or known.output_tokens:
            return known
        estimated = {"prompt_tokens": asked, "completion_tokens": self.size // BYTES_PER_TOKEN}
        return count(estimated, self.model or model, url, free=self.simulated)


def _or_none(arguments: str) -> str:
    """Replaces arguments that are not JSON because they were cut: endpoints reject a conversation that has them."""
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        return "{}"
    return arguments


def _unlike(calls: list[Json], taken: Sequence[str]) -> list[Json]:
    """Makes the calls' ids unique, because an answer is matched to its call by id."""
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
    """Returns usage and price of one call. It is unpriced when the usage is unreadable or the model's price unknown."""
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
    """Returns a token count: 0 when the endpoint sent none, None when it sent something else."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if 0 <= value <= MOST_TOKENS else None


def _price(tokens: genai_prices.Usage, model: str, url: str) -> float | None:
    """Returns USD by the endpoint's prices, else (for a gateway) by those of the vendor of a model with this name."""
    for endpoint in (url, None):
        try:
            return float(genai_prices.calc_price(tokens, model, provider_api_url=endpoint).total_price)
        except LookupError:
            continue
    return None
