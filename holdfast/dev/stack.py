"""The embedded stack: Temporal server, simulated hospital, scripted model and workers, each in its own process.

`starter.py up`, the demo and the tests use it. Each process runs in its own session, so that Ctrl-C at the terminal
reaches only the parent, which decides what happens. On Linux a child dies with its parent, even after SIGKILL;
elsewhere a parent that is killed with SIGKILL leaves its children running.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from holdfast.dev.published_settings import published
from holdfast.files import ROOT
from holdfast.settings import settings

READY_S = 90.0
"""Seconds that a process may take until it answers; all start at once, perhaps on a slow machine."""
OURS = ("TEMPORAL_", "HOLDFAST_", "OPENAI_", "DATABASE_URL")
"""Prefixes of environment variables that would make a process of the stack use another server, store or model."""


NOT_SERVED = "not served: "
"""Starts the line that a worker writes for a broken agent."""


class StackFailed(Exception):
    """A process of the stack did not start. The message names it and quotes the end of its log."""


class Child:
    """One process of the stack: its command, and the process that runs now."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.command = command
        self.environment = dict(environment)
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self.started_at = 0.0

    def start(self) -> None:
        """Starts or restarts the process. Call it from the main thread only: see `_die_with_parent`."""
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self.started_at = time.monotonic()
        with self.log.open("ab") as out:
            try:
                self._process = subprocess.Popen(
                    self.command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    preexec_fn=_die_with_parent(),
                )
            except OSError as error:
                raise StackFailed(f"{self.name} cannot be started: {self.command[0]}: {error.strerror}") from None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs or before its start; negative: the signal that ended it."""
        return self._process.poll() if self._process is not None else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process and its children; does nothing after it has ended."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def wait(self, seconds: float) -> bool:
        """Blocks until it ends or the time is up; returns whether it has ended."""
        if self._process is None:
            return True
        try:
            self._process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    def output(self) -> str:
        """Its output since the last start."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    @property
    def not_served(self) -> list[str]:
        """The broken agents that the worker reported, each with its file and error."""
        lines = self.output().splitlines()
        return [line.removeprefix(NOT_SERVED) for line in lines if line.startswith(NOT_SERVED)]

    async def until(self, ready: Callable[[], bool], seconds: float = READY_S) -> None:
        """Waits until `ready()`. Raises StackFailed when the process ends first, or is not ready in time."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.alive:
                raise StackFailed(self.complaint(f"ended with status {self.exit_code} while starting"))
            if time.monotonic() > deadline:
                raise StackFailed(self.complaint(f"was not ready after {seconds:.0f} s"))
            await asyncio.sleep(0.02)

    def complaint(self, what: str) -> str:
        """A message about this process, with the end of its log."""
        tail = "\n".join(f"  | {line}" for line in self.output().strip().splitlines()[-8:])
        return f"{self.name} {what}; its log is {self.log}" + (f"\n{tail}" if tail else "")


class Stack:
    """The processes, their ports and the environment that points to them.

    home: directory for state and logs; it outlives the stack. base: the environment to start from, such as
    `os.environ`; variables that point to other servers are replaced. durable: the Temporal server keeps its state under
    `home`, else in memory. scripted_model: start and use the scripted model; else `base` names the endpoint.
    think_s: seconds that the scripted model takes for an answer.
    """

    def __init__(
        self,
        home: Path,
        base: Mapping[str, str],
        *,
        durable: bool = True,
        scripted_model: bool = True,
        think_s: float | None = None,
    ) -> None:
        self.home = home.resolve()
        self.scripted_model = scripted_model
        self._durable = durable
        self._think_s = think_s
        self.logs = self.home / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.ports = _ports(self.home / "ports.json", ("temporal", "ui", "hospital", "model", "codec"))
        self.temporal_address = f"127.0.0.1:{self.ports['temporal']}"
        self.ui_url = f"http://127.0.0.1:{self.ports['ui']}"
        self.hospital_url = f"http://127.0.0.1:{self.ports['hospital']}"
        self.model_url = f"http://127.0.0.1:{self.ports['model']}/v1"
        readable = base.get("HOLDFAST_ENCRYPTION_KEYS") and base.get("HOLDFAST_CODEC_TOKEN")
        self.codec_url = f"http://127.0.0.1:{self.ports['codec']}" if readable else ""
        """The codec server, for the Web UI; empty without encryption keys or a codec token."""
        self.store_url = base.get("DATABASE_URL") or f"sqlite:///{self.home / 'holdfast.db'}"
        self.environment = {
            **{name: value for name, value in base.items() if not name.startswith("TEMPORAL_")},
            "TEMPORAL_ADDRESS": self.temporal_address,
            "TEMPORAL_CONFIG_FILE": os.devnull,  # a profile's TLS settings and API key are for another server
            "DATABASE_URL": self.store_url,
            **{k: v for k, v in self.addresses.items() if k.isupper()},
            "HOLDFAST_HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), base.get("PYTHONPATH", "")))),
            "PYTHONUNBUFFERED": "1",
        }
        # A worker that has to compile all its imports takes twice as long to start.
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.services = list(self._services())
        self.workers: list[Child] = []

    @property
    def addresses(self) -> dict[str, str]:
        """The addresses of the stack's processes, by the names of `Settings`."""
        found = {
            "stack_temporal_address": self.temporal_address,
            "HOLDFAST_UI_URL": self.ui_url,
            "HOLDFAST_HOSPITAL_URL": self.hospital_url,
        }
        if self.scripted_model:
            found |= {"OPENAI_BASE_URL": self.model_url, "OPENAI_API_KEY": "scripted", "HOLDFAST_MODEL": "scripted-1"}
        return found

    @property
    def published(self) -> dict[str, Any]:
        """The content of `stack.json`: the addresses and the other settings of the workers."""
        brought = self.addresses
        return {**published({k: v for k, v in self.environment.items() if k not in brought}), **brought}

    def publish(self) -> None:
        """Writes the workers' settings to `stack.json`, where the other commands read them. Atomic."""
        draft = self.home / "stack.tmp"
        draft.unlink(missing_ok=True)
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(self.published, indent=2) + "\n")
        draft.replace(self.home / "stack.json")

    @property
    def children(self) -> list[Child]:
        return [*self.services, *self.workers]

    def _child(self, name: str, command: list[str], **environment: str) -> Child:
        return Child(name, command, {**self.environment, **environment}, self.logs / f"{name.replace(' ', '-')}.log")

    def _services(self) -> Iterable[Child]:
        yield self._child("temporal server", self._temporal_command())
        yield self._simulation("hospital")
        if self.scripted_model:
            think = () if self._think_s is None else ("--think", str(self._think_s))
            yield self._simulation("scripted_model", "model", *think)
        if self.codec_url:
            at = ["--port", str(self.ports["codec"])]
            yield self._child("codec server", [sys.executable, str(ROOT / "starter.py"), "codec-server", *at])

    def _simulation(self, module: str, port: str = "", *more: str) -> Child:
        name = port or module
        at = ["--port", str(self.ports[name]), "--db", str(self.home / f"{name}.db")]
        return self._child(name, [sys.executable, "-m", f"holdfast.dev.simulation.{module}", *at, *more])

    def _temporal_command(self) -> list[str]:
        from holdfast.engine.client import SEARCH_ATTRIBUTES

        dynamic = {
            # By default timers are rounded up by as much as a second, which would delay runs of a killed worker.
            "history.timerProcessorMaxTimeShift": '"10ms"',
            "history.timerProcessorMaxPollRPS": "10000",
            "history.transferProcessorMaxPollRPS": "10000",
            "system.enableActivityEagerExecution": "true",
        }
        command = [temporal_cli(), "server", "start-dev", "--ip", "127.0.0.1", "--log-level", "error"]
        command += ["--port", str(self.ports["temporal"]), "--ui-port", str(self.ports["ui"])]
        if self._durable:
            command += ["--db-filename", str(self.home / "temporal.db")]
        for key, value in dynamic.items():
            command += ["--dynamic-config-value", f"{key}={value}"]
        for attribute in SEARCH_ATTRIBUTES:
            command += ["--search-attribute", f"{attribute.name}=Keyword"]
        return command

    async def start(self, workers: int = 1) -> None:
        """Starts everything, migrates the store and returns when all of it is ready.

        Raises StackFailed, StoreUnavailable, SchemaMismatch; the caller must call `stop` in any case.
        """
        from holdfast.state.schema import migrate

        for child in self.services:
            child.start()
        await asyncio.to_thread(migrate, self.store_url)
        await asyncio.gather(*(self.until_ready(child) for child in self.services))
        await self._schedule_sweep()
        await asyncio.gather(*(self.start_worker() for _ in range(workers)))

    async def start_worker(self, **environment: str) -> Child:
        """Starts one more worker, with additions to its environment, and returns it when it polls."""
        child = self._child(f"worker {len(self.workers) + 1}", [sys.executable, str(ROOT / "worker.py")], **environment)
        child.start()
        self.workers.append(child)
        await self.until_ready(child)
        return child

    async def until_ready(self, child: Child) -> None:
        """Waits until a started process answers. Raises StackFailed."""
        if child in self.workers:
            await child.until(lambda: "worker ready" in child.output())
            return
        port = int(child.command[child.command.index("--port") + 1])
        await child.until(lambda: _listens(port))
        if child.name == "temporal server":
            await self._until_server_answers()

    async def _schedule_sweep(self) -> None:
        """Schedules the orphan sweep, every five minutes, unless the server has it already."""
        from holdfast.engine.client import DATA_CONVERTER, Client
        from holdfast.recovery.orphans import schedule

        client = await Client.connect(self.temporal_address, data_converter=DATA_CONVERTER)
        await schedule(client, self.environment.get("HOLDFAST_TASK_QUEUE", "holdfast"))

    async def _until_server_answers(self) -> None:
        """Waits for the namespace and the search attributes, which come later than the open port."""
        from temporalio.service import RPCError

        from holdfast.engine.client import DATA_CONVERTER, Client, missing_search_attributes

        deadline = time.monotonic() + READY_S
        while True:
            try:
                client = await Client.connect(self.temporal_address, data_converter=DATA_CONVERTER)
                if not await missing_search_attributes(client):
                    return
            except (RuntimeError, RPCError) as error:
                if time.monotonic() > deadline:
                    raise StackFailed(f"temporal server does not answer at {self.temporal_address}: {error}") from None
            await asyncio.sleep(0.05)

    def stop(self, grace_s: float = 5.0) -> None:
        """Stops every process: SIGTERM, workers first, then SIGKILL after `grace_s` seconds. Blocks; idempotent."""
        for group in (self.workers, self.services):
            if grace_s > 0:
                for child in group:
                    child.signal(signal.SIGTERM)
                deadline = time.monotonic() + grace_s
                for child in group:
                    child.wait(deadline - time.monotonic())
            for child in group:
                child.signal(signal.SIGKILL)
        for child in self.children:
            child.wait(5.0)

    async def __aenter__(self) -> Self:
        """Starts everything with one worker; stops it all when any part fails to start."""
        try:
            await self.start()
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()


def temporal_cli() -> str:
    """The `temporal` binary: `HOLDFAST_TEMPORAL_CLI`, else beside Python or on PATH. Raises StackFailed."""
    if named := settings().temporal_cli:
        if shutil.which(named):
            return named
        raise StackFailed(f"HOLDFAST_TEMPORAL_CLI names {named!r}, which is no program that can be run")
    beside = Path(sys.executable).parent / "temporal"
    found = str(beside) if beside.exists() else shutil.which("temporal")
    if not found:
        raise StackFailed("no `temporal` binary beside Python or on PATH: run `uv sync`")
    return found


def without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that name a server, store or model."""
    return {name: value for name, value in environment.items() if not name.startswith(OURS)}


def _ports(remembered: Path, names: tuple[str, ...]) -> dict[str, int]:
    """A free port for each name, the same as last time if possible, so that noted addresses keep working."""
    last: object = None
    with suppress(FileNotFoundError, ValueError, RecursionError):  # a broken file is replaced
        last = json.loads(remembered.read_text())
    ports: dict[str, int] = {}
    for name in names:
        told = last.get(name) if isinstance(last, dict) else None
        port = told if isinstance(told, int) and 1024 <= told <= 65_535 else 0
        # Below the kernel's range for outgoing connections, which could otherwise hold the port.
        while not port or port in ports.values() or not _free(port):
            port = random.randint(20_000, 32_000)
        ports[name] = port
    remembered.write_text(json.dumps(ports))
    return ports


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _die_with_parent() -> Callable[[], None] | None:
    """What a child runs before exec so that it dies with this process: PR_SET_PDEATHSIG, on Linux only.

    The kernel watches the *thread* that forked, so children must be started from the main thread.
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def in_child() -> None:
        prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the call above
            os._exit(1)

    return in_child
