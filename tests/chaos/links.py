"""A TCP line between a worker and one service, which can be delayed, go silent, or be cut."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]


def to_port(port: int) -> Connect:
    return lambda: asyncio.open_connection("127.0.0.1", port)


def to_socket(path: str | os.PathLike[str]) -> Connect:
    return lambda: asyncio.open_unix_connection(path)


class Link:
    """Forwards every connection to its service. `port` is what the worker connects to.

    hold: bytes wait, and arrive when the line is let go (a frozen peer, a congested network).
    silence: bytes of the connections that exist now never arrive, and nobody is told (a lost NAT entry, a pulled
    cable). New connections are served once the line is let go.
    cut: the connections that exist now are closed with a reset.
    """

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._open = asyncio.Event()
        self._open.set()
        self._silent = False
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def hold(self) -> None:
        self._open.clear()

    def silence(self) -> None:
        self._silent = True
        for connection in self._connections:
            connection.silent = True

    def cut(self) -> None:
        for connection in list(self._connections):
            connection.reset()

    def let_go(self) -> None:
        self._silent = False
        self._open.set()

    async def close(self) -> None:
        if self._server:
            self._server.close()
        self.let_go()
        while self._connections:
            self.cut()
            await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer, silent=self._silent)
        self._connections.add(connection)
        try:
            # A service that is down refuses the connection, and a silent line takes it and says nothing.
            there, back = await self._connect()
            connection.writers.append(back)
            await asyncio.gather(
                self._pump(connection, reader, back), self._pump(connection, there, writer), return_exceptions=True
            )
        except OSError:
            connection.reset()
        finally:
            self._connections.discard(connection)
            for each in connection.writers:
                each.close()

    async def _pump(self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._open.wait()
                if connection.silent:
                    continue
                writer.write(data)
                await writer.drain()
        finally:
            # The end of the other side is no news on a silent line either.
            if not connection.silent:
                with suppress(OSError, RuntimeError):
                    writer.close()


class _Connection:
    def __init__(self, writer: asyncio.StreamWriter, *, silent: bool) -> None:
        self.writers = [writer]
        self.silent = silent

    def reset(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
