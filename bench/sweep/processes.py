"""Workers in a moment: a process that has imported all that `worker.py` imports, and forks a worker for each order.

The sweep starts several hundred workers, and nine tenths of a worker's start are imports. What is forked is single
threaded and has no connection yet; it runs the `main` of `worker.py` in its own environment, as a process of its own.

    python -m bench.sweep.processes      reads orders from its input, a JSON object a line; answers with the process id
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import psutil

from holdfast.authoring import registry
from holdfast.authoring.services import BreakerRule, Service
from holdfast.dev.stack import ROOT, Child, _die_with_parent
from holdfast.reliability import crash_points
from holdfast.state.sqlite import Sqlite


def main() -> None:
    import worker  # noqa: F401 - imported for those that are forked
    import workflows.serving  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for their exit statuses
    for line in sys.stdin:
        order = json.loads(line)
        dying = _die_with_parent()
        pid = os.fork()
        if not pid:
            if dying:
                dying()
            _become(order)
        print(pid, flush=True)


def _become(order: dict[str, Any]) -> NoReturn:
    import worker

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for to, number in ((null, 0), (out, 1), (out, 2)):
        os.dup2(to, number)
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = ["worker.py", *order["arguments"]]
    _probe_soon()
    _freeze_between_writes()
    worker.end_process(worker.main())


def _probe_soon() -> None:
    """The appointments are probed after seconds, where production waits half a minute. Long enough to be put off."""
    spec = registry.agent("discharge")
    soon = Service("appointments", breaker=BreakerRule(probe_after_s=4.0))
    registry.add(replace(spec, services=(*spec.services, soon)))


def _freeze_between_writes() -> None:
    """Keeps a freeze from falling into a write to SQLite that another call of the same worker has under way.

    A process that is stopped there holds the file's lock until it wakes or dies, and all others wait: a limit of SQLite
    that the platform cannot lift, and with which no case would show anything else. A kill may fall there.
    """
    idle, do = threading.Lock(), Sqlite._do

    def alone(self: Sqlite, job: Callable[[], Any]) -> Any:
        def locked() -> Any:
            with idle:
                return job()

        return do(self, locked)

    def stop(pid: int, number: signal.Signals) -> None:
        if number is not signal.SIGSTOP:
            os.kill(pid, number)
            return
        with idle:
            os.kill(pid, number)

    Sqlite._do = alone
    crash_points.strike = stop


class ForkServer:
    """The process, as the sweep sees it. It and its workers die with whoever started it."""

    def __init__(self, environment: Mapping[str, str], logs: Path) -> None:
        self._environment = dict(environment)
        self._logs = logs
        self._born = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.sweep.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=self._environment,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
        self.workers: list[Child] = []

    async def worker(self, *arguments: str, **environment: str) -> Child:
        """A worker with these arguments and additions to its environment; returns when it polls. Raises StackFailed."""
        self._born += 1
        name = f"worker {self._born}"
        environment = {**self._environment, **environment}
        child = _Forked(name, self, arguments, environment, self._logs / f"worker-{self._born}.log")
        child.start()
        self.workers.append(child)
        await child.until(lambda: "worker ready" in child.output())
        return child

    def fork(self, order: Mapping[str, Any]) -> int:
        """The process id of a new worker. Blocks for a moment, the first time until the imports are done."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def stop(self) -> None:
        for child in self.workers:
            child.signal(signal.SIGKILL)
        self._process.kill()
        self._process.communicate()


class _Forked(Child):
    """A worker that is not our own child: it can be signalled and watched, but has no exit status for us."""

    def __init__(
        self, name: str, fork_server: ForkServer, arguments: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        super().__init__(name, ["worker.py", *arguments], environment, log)
        self._fork_server = fork_server
        self._it: psutil.Process | None = None

    def start(self) -> None:
        order = {"arguments": self.command[1:], "environment": self.environment, "log": str(self.log)}
        pid = self._fork_server.fork(order)
        with suppress(psutil.NoSuchProcess):
            self._it = psutil.Process(pid)

    @property
    def pid(self) -> int:
        assert self._it is not None
        return self._it.pid

    @property
    def alive(self) -> bool:
        # Compares the start time too: the process id may be another's by now.
        with suppress(psutil.NoSuchProcess):
            if self._it is not None and self._it.is_running():
                return self._it.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return False

    def wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.alive


if __name__ == "__main__":
    main()
