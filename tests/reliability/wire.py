"""A server that misbehaves on the wire exactly as told: real sockets, because that is where the failures are."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Then(Enum):
    HANG = "say nothing more until the client goes away"
    RESET = "drop the connection with a TCP reset"
    CLOSE = "close the connection in an orderly way"


@dataclass(frozen=True)
class Pause:
    seconds: float


Step = bytes | Pause | Then


@dataclass
class Wire:
    port: int = 0
    requests: list[tuple[str, bytes]] = field(default_factory=list)
    """Head and body of each request."""
    connections: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with the first request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def json(self, index: int = -1) -> Any:
        return json.loads(self.requests[index][1])


@asynccontextmanager
async def wire(*steps: Step, greets: bool = False) -> AsyncIterator[Wire]:
    """Answers every request by the steps. `greets`: does not wait for a request first."""
    server_side = Wire()
    serving: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_side.connections += 1
        serving.add(asyncio.current_task())
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                if not greets:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                    length = re.search(r"content-length: (\d+)", head, re.I)
                    body = await reader.readexactly(int(length[1]) if length else 0)
                    server_side.requests.append((head, body))
                    server_side.asked.set()
                if await _play(steps, reader, writer) or greets:
                    break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    server_side.port = server.sockets[0].getsockname()[1]
    try:
        yield server_side
    finally:
        server.close()
        for task in serving:
            if task is not None:
                task.cancel()
        await asyncio.gather(*filter(None, serving))


async def _play(steps: Sequence[Step], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Returns whether the connection is over."""
    for step in steps:
        match step:
            case bytes():
                writer.write(step)
                await writer.drain()
            case Pause(seconds):
                await asyncio.sleep(seconds)
            case Then.HANG:
                await reader.read()
                return True
            case Then.CLOSE:
                return True
            case Then.RESET:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return True
    return False


def answer(status: int, body: bytes | Any = b"", content_type: str = "application/json", **headers: str) -> bytes:
    """A whole response. Header names are given with underscores."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"content-type: {content_type}", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def piece(data: bytes) -> bytes:
    """A part of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(data: Any) -> bytes:
    """A server-sent event, as a part of a chunked body."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return piece(f"data: {text}\n\n".encode())


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
