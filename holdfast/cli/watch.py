"""Supervises the stack for `up`: restarts processes that end, and reloads the agents when their files change.

An error in an agent never ends the stack. A change that cannot be imported is not loaded; a worker that starts
meanwhile serves the other agents, and a worker that cannot start at all waits for the next change.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from rich.markup import escape

from holdfast.authoring.places import places
from holdfast.cli.output import err, out
from holdfast.dev.stack import Child, Stack, StackFailed

SHORT_LIFE_S = 10.0
SHORT_LIVES = 3
"""A process that ends this often in a row, each time within SHORT_LIFE_S, is not restarted."""

IMPORT_S = 60.0
"""How long an import of the agents may take, in seconds: a hanging import would block the watch."""

IMPORT = (
    "from holdfast.authoring import registry; from holdfast.reasoning.loading import load_graphs;"
    " load_graphs(); registry.none_is_broken()"
)
IMPORT_SCRIPTS = "from holdfast.dev.simulation import script; script.scripts()"

Files = dict[Path, int]
"""The modification time of each file, in nanoseconds."""


class Watch:
    """Watches a stack that has started."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._short_lives: Counter[str] = Counter()
        self._waiting: set[Child] = set()
        """Processes that cannot start because of an error in an agent."""
        self._folders = [place.folder for place in places().there]
        self._taken = self._tried = self._now()

    async def run(self) -> NoReturn:
        """Raises StackFailed when a process keeps ending for a reason other than an error in an agent."""
        seen = self._tried
        while True:
            for child in self._stack.children:
                if not child.alive and child not in self._waiting:
                    await self._revive(child)
            await asyncio.sleep(0.25)
            before, seen = seen, self._now()
            if seen == before != self._tried:  # changed, and stable since the last look
                self._tried = seen
                await self._take(seen)

    async def _take(self, files: Files) -> None:
        """Restarts the processes that import the agents, unless the changed agents cannot be imported."""
        if complaint := await self._complaint(self._stack.scripted_model):
            err.print(f"[red]{self._changed(files)}, but is not taken:[/red] {escape(complaint)}")
            return
        for child in self._stack.children:
            if child.name == "model" or child in self._stack.workers:
                child.signal(signal.SIGTERM)
                await asyncio.to_thread(child.wait, 5.0)
                child.signal(signal.SIGKILL)
                child.wait(5.0)
                self._waiting.discard(child)
                await self._start(child)
        if not self._waiting and not any(worker.not_served for worker in self._stack.workers):
            out.print(f"[dim]{self._changed(files)}, taken at {_clock()}[/dim]")
            self._taken = files

    def _now(self) -> Files:
        return {path: changed for folder in self._folders for path, changed in agents_now(folder).items()}

    def _changed(self, files: Files) -> str:
        """What differs, such as `agents/ has changed (expenses/spec.py)`: three files, a count of the rest."""
        differ = {path for path, _ in self._taken.items() ^ files.items()}
        if not differ:
            return "the agents are as before"
        folders = [each for each in self._folders if any(path.is_relative_to(each) for path in differ)]
        names = sorted(str(path.relative_to(each)) for each in folders for path in differ if path.is_relative_to(each))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{', '.join(f'{each.name}/' for each in folders)} has changed ({', '.join(names[:3])}{more})"

    async def _revive(self, child: Child) -> None:
        lived = time.monotonic() - child.started_at
        self._short_lives[child.name] = self._short_lives[child.name] + 1 if lived < SHORT_LIFE_S else 0
        if self._short_lives[child.name] >= SHORT_LIVES:
            raise StackFailed(child.complaint("keeps ending"))
        status = child.exit_code
        if await self._start(child):
            out.print(f"[yellow]{child.name} had ended (status {status}) and was started again[/yellow]")

    async def _start(self, child: Child) -> bool:
        """Starts a process; whether it is ready. If not, it waits for a change of an agent, or `_revive` retries it."""
        before = self._now()
        child.start()
        try:
            await self._stack.until_ready(child)
        except StackFailed as error:
            now = self._now()
            complaint = await self._complaint(scripts=False) if child in self._stack.workers else ""
            if complaint:
                self._waiting.add(child)
                self._tried = now
                err.print(f"[yellow]{child.name} waits:[/yellow] {escape(complaint)}; save the file and it goes on")
            else:
                err.print(f"[red]{escape(str(error))}[/red]")
            if complaint or now != before:  # the files may have changed since it read them
                self._short_lives[child.name] = 0
            return False
        for broken in child.not_served:
            err.print(f"[yellow]{child.name} works without a broken agent:[/yellow] {escape(broken)}")
        return True

    async def _complaint(self, scripts: bool) -> str:
        """Why the agents cannot be imported now, in one line; empty when it can."""
        code = f"{IMPORT}; {IMPORT_SCRIPTS}" if scripts else IMPORT
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code),
            env=self._stack.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(IMPORT_S):
                _, said = await process.communicate()
        except TimeoutError:
            return f"importing the agents takes longer than {IMPORT_S:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                process.kill()
        if not process.returncode:
            return ""
        line = said.decode(errors="replace").strip().rpartition("\n")[2]
        for name in ("holdfast.authoring.registry.BrokenAgent", "holdfast.dev.simulation.script.ScriptFailed"):
            line = line.removeprefix(f"{name}: ")
        return line or f"importing the agents ends the process with status {process.returncode}"


def agents_now(folder: Path) -> Files:
    """The files under a folder of agents and their modification times, without tests and editors' temporary files."""
    found = (
        path for path in folder.rglob("*") if path.is_file() and not any(map(_aside, path.relative_to(folder).parts))
    )
    with suppress(FileNotFoundError):  # a file may vanish between listing and stat
        return {path: path.stat().st_mtime_ns for path in found}
    return {}


def _aside(part: str) -> bool:
    return part.startswith((".", "test_", "__pycache__", "#")) or part.endswith("~")


def _clock() -> str:
    return f"{datetime.now().astimezone():%H:%M:%S}"
