"""The notebook (`tests.integration.mcp.server`) over both transports, and a connection to it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from holdfast.dev.stack import ROOT
from holdfast.ext.mcp.connection import Connection
from holdfast.ext.mcp.spec import McpServer
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.stack import until


@dataclass
class Notebook:
    """A server to name in a spec, and what its processes were asked."""

    journal: Path
    server: McpServer
    connections: list[Connection] = field(default_factory=list)

    def calls(self, tool: str) -> list[dict[str, Any]]:
        """The calls of a tool that reached the server: `key` and `pid`."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [call for call in map(json.loads, lines) if call["tool"] == tool]

    async def called(self, tool: str, times: int = 1) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.calls(tool)) < times:
                await asyncio.sleep(0.02)
        return self.calls(tool)[-1]

    def connection(self) -> Connection:
        self.connections.append(Connection(self.server))
        return self.connections[-1]

    async def call(self, connection: Connection, tool: str, /, connect_s: float = 20, **arguments: Any) -> Any:
        """Calls as a decision of this moment would."""
        name = self.server.tool_name(tool)
        version = (await connection.tools(connect_s))[name].version
        return await connection.call(name, version, arguments, "key-1", connect_s=connect_s)

    def processes(self) -> list[psutil.Process]:
        """The server's processes that live, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.journal) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    async def gone(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.processes():
                await asyncio.sleep(0.05)


def name() -> str:
    """Two agents may not mean different servers by one name, and the registry keeps those of all tests."""
    return f"n{uuid.uuid4().hex[:6]}"


def stdio(journal: Path, **more: Any) -> McpServer:
    os.environ["PYTHONPATH"] = str(ROOT)  # the server is a module of these tests
    more["env"] = ("PYTHONPATH", *more.get("env", ()))
    return McpServer(name(), command=(sys.executable, "-m", "tests.integration.mcp.server", str(journal)), **more)


@pytest_asyncio.fixture
async def notebook(tmp_path: Path) -> AsyncIterator[Notebook]:
    """Over stdio."""
    one = Notebook(tmp_path / "journal", stdio(tmp_path / "journal"))
    yield one
    await asyncio.gather(*(each.close() for each in one.connections))


@dataclass
class Served(Notebook):
    process: subprocess.Popen[bytes] | None = None

    def start(self, port: int = 0, **environment: str) -> None:
        command = [sys.executable, "-m", "tests.integration.mcp.server", str(self.journal), str(port)]
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment})

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


@contextmanager
def served(tmp_path: Path, **environment: str) -> Iterator[Callable[..., Served]]:
    """A notebook over HTTP; call it with the rest of the spec once the server is up."""
    journal = tmp_path / "journal"
    one = Served(journal, stdio(journal))
    port = journal.with_suffix(".port")

    def made(**more: Any) -> Served:
        one.server = McpServer(name(), url=f"http://127.0.0.1:{port.read_text()}/mcp", **more)
        return one

    try:
        one.start(**environment)
        until(lambda: port.exists() and port.read_text())
        yield made
    finally:
        one.stop()


@pytest_asyncio.fixture
async def http_notebook(tmp_path: Path) -> AsyncIterator[Served]:
    """Over streamable HTTP."""
    with served(tmp_path) as make:
        one = make()
        yield one
        await asyncio.gather(*(each.close() for each in one.connections))


@pytest.fixture(params=["stdio", "http"])
def either(request: pytest.FixtureRequest) -> Notebook:
    return request.getfixturevalue({"stdio": "notebook", "http": "http_notebook"}[request.param])
