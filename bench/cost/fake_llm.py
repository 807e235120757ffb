"""An OpenAI-compatible endpoint without think time: `python -m bench.cost.fake_llm PORT`. It streams chat completions.

The answer follows from the request: the turn is one more than the assistant messages in it, the first user message says
how many turns there are. By hand on uvloop, about 50 µs a request, so that the workers are what is measured.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import uvloop

from bench.cost import task

_ASSISTANT = re.compile(rb'"role":\s?"assistant"')
_PROMPT = re.compile(rb"Do the work ([\w-]+) in turns=(\d+)(, with a release)?")
_LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_MODEL = "gpt-5-mini"
"""A model with a known price: costing a call is part of the work."""


def answer(body: bytes) -> bytes:
    """The whole HTTP answer to a request's body."""
    found = _PROMPT.search(body)
    assert found is not None
    turn = len(_ASSISTANT.findall(body)) + 1
    last = turn == int(found[2]) - 1 and found[3] is not None
    if turn >= int(found[2]):
        return _stream([{"content": part} for part in re.split(r"(?<= )", task.final(turn))], "stop")
    return _call(turn, "release", found[1].decode()) if last else _call(turn, "record", f"row {turn}")


@cache
def _call(turn: int, tool: str, row: str) -> bytes:
    start = {"index": 0, "id": f"call_{turn}", "type": "function", "function": {"name": tool, "arguments": ""}}
    more = [{"index": 0, "function": {"arguments": part}} for part in ('{"row"', ": ", json.dumps(row), "}")]
    return _stream([{"tool_calls": [call]} for call in (start, *more)], "tool_calls")


def _stream(deltas: list[dict[str, Any]], finish: str) -> bytes:
    head = {"id": "cc-1", "object": "chat.completion.chunk", "created": 1700000000, "model": _MODEL}
    choices = [{"index": 0, "delta": d, "finish_reason": None} for d in ({"role": "assistant"}, *deltas)]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish})
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    chunks = [{**head, "choices": [choice]} for choice in choices] + [{**head, "choices": [], "usage": usage}]
    events = [f"data: {text}\n\n".encode() for text in (*map(json.dumps, chunks), "[DONE]")]
    return _HEAD + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"


class Http(asyncio.Protocol):
    """Hands each request's body to `answer` and sends what it returns."""

    def __init__(self, answer: Callable[[bytes], bytes] = answer) -> None:
        self._answer = answer

    def connection_made(self, transport: Any) -> None:
        self._transport, self._buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._buffer, 0, end)
            assert length is not None
            stop = end + 4 + int(length[1])
            if len(self._buffer) < stop:
                return
            self._transport.write(self._answer(self._buffer[end + 4 : stop]))
            self._buffer = self._buffer[stop:]


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Http, "127.0.0.1", port)
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
