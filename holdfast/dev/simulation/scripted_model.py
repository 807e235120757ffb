"""A scripted model behind an OpenAI-compatible endpoint, in its own process. It needs no key and costs nothing.

    python -m holdfast.dev.simulation.scripted_model --port 8091 --db model.db [--think 0.15]

    GET /v1/models, POST /v1/chat/completions (tools, streamed or not, usage), PUT and DELETE /faults (service: model)

`script.py` chooses the answer from the messages and the offered tools. The model records every call in its own SQLite
file, with its `Idempotency-Key`, so that tests can count calls that were paid for twice.
Usage is simulated too: a token is four characters of JSON, rounded up.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from holdfast.contracts.data import Json
from holdfast.contracts.failures import explain
from holdfast.dev.simulation.script import ScriptFailed, decide
from holdfast.dev.simulation.serve import Database, arguments, read_rows, serve
from holdfast.dev.simulation.service_faults import FaultBoard, refusal, under
from holdfast.dev.simulation.weak import RAMBLE, Said, weak
from holdfast.reliability.sent_keys import inside, outside

MODEL = "scripted-1"
FINGERPRINT = "simulated"
PIECE = 48
"""Characters in one chunk of a stream."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, received_at REAL NOT NULL, answered_at REAL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS weaknesses (
    call INTEGER PRIMARY KEY, key TEXT NOT NULL, kind TEXT NOT NULL, cut INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS weaknesses_by_key ON weaknesses (key);
"""


@dataclass(frozen=True)
class CallRow:
    """A call as received. `answered_at` is None unless the last byte went to a client that was still connected."""

    id: int
    key: str
    received_at: float
    answered_at: float | None
    input_tokens: int
    output_tokens: int


class ModelRecord:
    """Reads a scripted model's SQLite file, with the platform's form of keys. prefix: one run's `key_base/`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def calls(self, prefix: str = "") -> list[CallRow]:
        sql = "SELECT * FROM calls WHERE substr(key, 1, length(?)) = ? ORDER BY id"
        rows = read_rows(self._path, sql, (outside(prefix), outside(prefix)))
        return [CallRow(**{**row, "key": inside(row["key"])}) for row in rows]

    def weaknesses(self, prefix: str = "") -> dict[str, int]:
        """How often a weak model did what, and how many of its endless streams the client cut ("cut off")."""
        sql = "SELECT kind, cut FROM weaknesses WHERE substr(key, 1, length(?)) = ?"
        rows = read_rows(self._path, sql, (outside(prefix), outside(prefix)))
        return {**Counter(row["kind"] for row in rows), "cut off": sum(row["cut"] for row in rows)}

    def ledger(self, prefix: str = "") -> Json:
        """Counts: {"calls", "answered", "input_tokens", "output_tokens", "keys": {key: {"calls", "answered"}}}.

        Tokens are those of answered calls.
        """
        calls = self.calls(prefix)
        answered = [call for call in calls if call.answered_at is not None]
        keys: dict[str, Json] = {call.key: {"calls": 0, "answered": 0} for call in calls}
        for call in calls:
            keys[call.key]["calls"] += 1
            keys[call.key]["answered"] += call.answered_at is not None
        return {
            "calls": len(calls),
            "answered": len(answered),
            "input_tokens": sum(call.input_tokens for call in answered),
            "output_tokens": sum(call.output_tokens for call in answered),
            "keys": keys,
        }


class StreamOptions(BaseModel):
    include_usage: bool = False


class Completion(BaseModel):
    """The part of a chat completion request that the script uses. Every model name is answered as `scripted-1`."""

    messages: list[Json]
    tools: list[Json] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class ScriptedModel:
    def __init__(self, db: Path, think_s: float = 0.0, weak: int | None = None) -> None:
        """weak: the seed of a weak model; None: a normal one."""
        self._weak = weak
        self._db = Database(db, _SCHEMA)
        self._record = ModelRecord(db)
        self._think_s = think_s
        self._faults = FaultBoard(("model",))
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/ledger", self._ledger, methods=["GET"]),
                *self._faults.routes,
            ]
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "simulated"}]}
        )

    async def _ledger(self, request: Request) -> Response:
        return JSONResponse(self._record.ledger(request.query_params.get("prefix", "")))

    async def _complete(self, request: Request) -> Response:
        received = time.time()
        try:
            asked = Completion.model_validate_json(await request.body())
        except ValidationError as error:
            return refusal(400, explain(error))
        try:
            message = decide(asked.messages, asked.tools)
        except ScriptFailed as error:
            # Not a 500: the model works, and a retry does not fix a script.
            return refusal(400, str(error))
        key = request.headers.get("Idempotency-Key", "")
        said = Said("well", message)
        if self._weak is not None:
            run = "/".join(key.split("/")[:2])
            ((number,),) = self._db.rows(
                "SELECT count(*) FROM weaknesses WHERE key > ? AND key < ?", (f"{run}/", f"{run}0")
            )
            said = weak(self._weak, key.partition("/")[0], number, message, asked.messages)
        message = said.message
        read, written = tokens([asked.messages, asked.tools]), tokens(message)
        row = self._db.write(
            "INSERT INTO calls (key, received_at, input_tokens, output_tokens) VALUES (?, ?, ?, ?)",
            (key, received, read, written),
        )
        if self._weak is not None:
            self._db.write("INSERT INTO weaknesses (call, key, kind) VALUES (?, ?, ?)", (row, key, said.kind))

        def answered() -> None:
            self._db.write("UPDATE calls SET answered_at = ? WHERE id = ?", (time.time(), row))

        async def work() -> Response:
            await asyncio.sleep(self._think_s)
            base = {
                "id": f"chatcmpl-{row}",
                "created": int(received),
                "model": MODEL,
                "system_fingerprint": FINGERPRINT,
            }
            usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
            if asked.stream and said.kind == "rambles":
                return Endless(base, lambda: self._db.write("UPDATE weaknesses SET cut = 1 WHERE call = ?", (row,)))
            if asked.stream:
                chunks = stream(
                    message,
                    base,
                    said.finish or _finish(message),
                    usage if asked.stream_options.include_usage else None,
                )
                return Answer("text/event-stream", [b"data: " + each + b"\n\n" for each in chunks], answered)
            choice = {"index": 0, "message": {"content": None} | message, "finish_reason": _finish(message)}
            whole = base | {"object": "chat.completion", "choices": [choice], "usage": usage}
            return Answer("application/json", [json.dumps(whole).encode()], answered)

        return await under(self._faults.take("model", "POST"), work)


def tokens(value: Any) -> int:
    """The size of JSON data in simulated tokens: four characters each, rounded up."""
    return -(-len(json.dumps(value, ensure_ascii=False)) // 4)


def _finish(message: Json) -> str:
    return "tool_calls" if message.get("tool_calls") else "stop"


def stream(message: Json, base: Json, finish: str, usage: Json | None) -> Iterator[bytes]:
    """The message as data of server-sent events: deltas, the finish reason, the usage if requested, [DONE]."""

    def event(choices: list[Json], **more: Any) -> bytes:
        return json.dumps(base | {"object": "chat.completion.chunk", "choices": choices, **more}).encode()

    def delta(part: Json, finish: str | None = None) -> bytes:
        return event([{"index": 0, "delta": part, "finish_reason": finish}])

    yield delta({"role": "assistant", "content": ""})
    for piece in _pieces(message.get("content") or ""):
        yield delta({"content": piece})
    for index, call in enumerate(message.get("tool_calls") or ()):
        name = {"name": call["function"]["name"], "arguments": ""}
        yield delta({"tool_calls": [{"index": index, "id": call["id"], "type": "function", "function": name}]})
        for piece in _pieces(call["function"]["arguments"]):
            yield delta({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    yield delta({}, finish)
    if usage:
        yield event([], usage=usage)
    yield b"[DONE]"


def _pieces(text: str) -> Iterator[str]:
    return (text[at : at + PIECE] for at in range(0, len(text), PIECE))


class Answer(Response):
    """Sends the chunks one by one, then calls `answered` if the connection is still open after the last."""

    def __init__(self, media_type: str, chunks: Sequence[bytes], answered: Callable[[], None]) -> None:
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self._chunks = chunks
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = len(self._chunks) - 1
        for number, chunk in enumerate(self._chunks):
            await send({"type": "http.response.body", "body": chunk, "more_body": number < last})
            # Between two chunks, let other requests run and notice that this client disconnects.
            await asyncio.sleep(0)
        if not scope["state"]["transport"].is_closing():
            self._answered()


class Endless(Response):
    """Sends text until the client disconnects, then calls `cut`."""

    def __init__(self, base: Json, cut: Callable[[], object]) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        chunk = base | {"choices": [{"index": 0, "delta": {"content": RAMBLE}, "finish_reason": None}]}
        self._chunk = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        self._cut = cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        transport = scope["state"]["transport"]
        while not transport.is_closing():
            await send({"type": "http.response.body", "body": self._chunk, "more_body": True})
            await asyncio.sleep(0)
        self._cut()


def main() -> None:
    parser = arguments("A scripted, OpenAI-compatible model.")
    parser.add_argument("--think", type=float, default=0.0, help="seconds before each answer")
    seed = os.environ.get("HOLDFAST_WEAK_MODEL") or None
    parser.add_argument("--weak", type=int, default=seed, metavar="SEED", help="be a weak model (HOLDFAST_WEAK_MODEL)")
    options = parser.parse_args()
    serve(ScriptedModel(options.db, options.think, options.weak).app, options, "scripted model")


if __name__ == "__main__":
    main()
