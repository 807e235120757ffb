"""Starts a simulated service as the stack does: a process of its own, on a free port, with a file of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fixtures.clock import PATIENCE_S


@dataclass(frozen=True)
class Running:
    url: str
    db: Path
    process: subprocess.Popen[str]


@contextmanager
def service(module: str, db: Path, *options: str) -> Iterator[Running]:
    """Runs `holdfast.dev.simulation.<module>`; kills it at the end if it still runs."""
    command = [sys.executable, "-m", f"holdfast.dev.simulation.{module}", "--port", "0", "--db", str(db), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        assert " ready on " in ready, ready
        yield Running(ready.split()[-1], db, process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def until(condition: Callable[[], object]) -> None:
    """Waits for something that another process does."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)
