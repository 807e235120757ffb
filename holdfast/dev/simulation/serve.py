"""Runs a simulated service as a process, with one port, one SQLite file and a fast shutdown."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """Hands the TCP transport to the application as `scope["state"]["transport"]`, so that a fault can cut it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


class Server(uvicorn.Server):
    """Ends at the first signal with status 0, without waiting for requests that a fault keeps hanging."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = self.force_exit = True


def arguments(description: str) -> ArgumentParser:
    """A parser with the options of every simulated service."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one; the ready line names it")
    parser.add_argument("--db", type=Path, required=True, help="the service's SQLite file, created if missing")
    return parser


def serve(app: Starlette, options: Namespace, label: str) -> None:
    """Serves until SIGTERM or SIGINT. Prints `<label> ready on http://host:port` once it accepts connections.

    Exits with status 2 and one line when it cannot listen on the port.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        print(f"{label}: cannot listen on {options.host}:{options.port}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    config = uvicorn.Config(app, http=Connection, ws="none", lifespan="off", access_log=False, log_level="critical")
    print(f"{label} ready on http://{options.host}:{listener.getsockname()[1]}", flush=True)
    Server(config).run(sockets=[listener])


class Database:
    """The service's record. One connection, used on the event loop: a write takes some tens of microseconds."""

    def __init__(self, path: Path, schema: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        # A killed process loses nothing at NORMAL; only a power cut could, and this is a simulation.
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.executescript(schema)

    def write(self, sql: str, values: Sequence[Any]) -> int:
        """Runs one statement and returns the id of the row it inserted."""
        return self._connection.execute(sql, values).lastrowid or 0

    def rows(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql, values).fetchall()

    def __enter__(self) -> Database:
        self._connection.execute("BEGIN IMMEDIATE")
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.execute("ROLLBACK" if error[0] else "COMMIT")


def read_rows(path: str | os.PathLike[str], sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """Reads a service's file from any process, while the service writes. Raises OperationalError if it is missing."""
    connection = sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro", uri=True)
    try:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(sql, values)]
    finally:
        connection.close()
