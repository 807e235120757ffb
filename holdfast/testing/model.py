"""An OpenAI-compatible model over real HTTP whose answers a test writes as a function of the messages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from holdfast.testing.service import served

Message = dict[str, Any]
Script = Callable[[list[Message]], Message | Response]


def say(text: str) -> Message:
    return {"role": "assistant", "content": text}


def call(*calls: tuple[str, dict[str, Any]] | tuple[str, str]) -> Message:
    """An answer that calls tools; arguments given as text are sent as they are."""
    return {
        "role": "assistant",
        "tool_calls": [
            {
                "id": f"call_{n}_{name}",
                "type": "function",
                "function": {"name": name, "arguments": a if isinstance(a, str) else json.dumps(a)},
            }
            for n, (name, a) in enumerate(calls)
        ],
    }


def turn(messages: list[Message]) -> int:
    """How many answers the conversation already has, plus one."""
    return sum(m["role"] == "assistant" for m in messages) + 1


def sequence(*answers: Message) -> Script:
    """The n-th answer for the n-th question of a conversation; the last one for ever."""
    return lambda messages: answers[min(turn(messages), len(answers)) - 1]


@dataclass
class FakeModel:
    script: Script = field(default=lambda messages: say("done"))
    requests: list[tuple[str, list[Message]]] = field(default_factory=list)
    """Idempotency key and messages of every request."""
    bodies: list[Message] = field(default_factory=list)
    """The whole of every request."""
    url: str = ""
    gate: asyncio.Event | None = None
    """When there is one, no request is answered before it is set."""

    @property
    def offered(self) -> list[set[str]]:
        """Names of the tools of every request."""
        return [{each["function"]["name"] for each in body.get("tools") or ()} for body in self.bodies]

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.requests.append((request.headers.get("idempotency-key", ""), body["messages"]))
        if self.gate:
            await self.gate.wait()
        answer = self.script(body["messages"])
        if isinstance(answer, Response):
            return answer
        delta = dict(answer)
        if "tool_calls" in delta:
            delta["tool_calls"] = [{"index": n, **c} for n, c in enumerate(delta["tool_calls"])]
        finish = "tool_calls" if "tool_calls" in delta else "stop"
        usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
        head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "fake-1"}
        chunks = [
            {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
            {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]},
            {**head, "choices": [], "usage": usage},
        ]

        async def body_of() -> AsyncIterator[str]:
            for chunk in chunks:
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(body_of(), media_type="text/event-stream")

    @classmethod
    @asynccontextmanager
    async def serve(cls) -> AsyncIterator[FakeModel]:
        model = cls()
        chat = Route("/v1/chat/completions", model._complete, methods=["POST"])
        names = Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": []}))
        app = Starlette(routes=[chat, names])
        async with served(app) as address:
            model.url = f"{address}/v1"
            yield model


def error(status: int, code: str = "", words: str = "", **headers: str) -> JSONResponse:
    body = {"error": {"message": words or f"test says {status}", "type": "test", "code": code or None}}
    return JSONResponse(body, status_code=status, headers={k.replace("_", "-"): v for k, v in headers.items()})
