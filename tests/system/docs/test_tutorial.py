"""The tutorial's commands are run as they stand there, in order, against a real stack; its files are the ones it shows.

Comments above a block that is to be run say how: `terminal: NAME` leaves it running, `shows: TEXT` is what it has to
show (a command is run again until it does), `in NAME shows: TEXT` waits for a terminal's word after it, `exit: N` is
its status, `Ctrl-C: NAME` ends what runs there.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from holdfast.dev.stack import ROOT
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.checkout import Checkout
from tests.fixtures.stack import processes_of, until
from tests.system.docs.blocks import Block, blocks

TUTORIAL = list(blocks(ROOT / "docs/tutorial/README.md", "sh"))

UV = f"""#!/bin/sh
# `uv run` in the environment that the tests have.
shift
if [ "$1" = pytest ]; then shift; exec {sys.executable} -m pytest -n 0 "$@"; fi
exec {sys.executable} -u "$@"
"""


class Terminal:
    """Something that runs on, and what it has said since somebody last waited for it."""

    def __init__(self, command: str, checkout: Checkout, log: Path) -> None:
        self.log, self._read = log, 0
        with log.open("w") as out:
            self.process = subprocess.Popen(
                ["bash", "-c", command],
                cwd=checkout.root,
                env=checkout.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def wait_for(self, words: str) -> None:
        def said() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return words in self.log.read_text()[self._read :]

        until(said)
        self._read = len(self.log.read_text())

    def interrupt(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(PATIENCE_S)


class Reader:
    """Somebody who follows the tutorial to the letter."""

    def __init__(self, checkout: Checkout) -> None:
        self.checkout = checkout
        self.terminals: dict[str, Terminal] = {}
        uv = checkout.root / "bin" / "uv"
        uv.parent.mkdir()
        uv.write_text(UV)
        uv.chmod(0o755)
        checkout.environment["PATH"] = f"{uv.parent}{os.pathsep}{os.environ['PATH']}"
        self._ports = {"9000": _free_port(), "9001": _free_port()}

    def do(self, block: Block) -> None:
        if "Ctrl-C" in block.said:
            self.terminals.pop(block.said["Ctrl-C"]).interrupt()
        if "run" not in block.said:
            return
        command = re.sub(r"\b900[01]\b", lambda found: self._ports[found[0]], block.text)
        if (name := block.said.get("terminal")) is not None:
            self.terminals[name] = Terminal(command.strip(), self.checkout, self.checkout.root / f"{name}.log")
            if "shows" in block.said:
                self.terminals[name].wait_for(block.said["shows"])
            return
        self._run(block, command)
        for name, terminal in self.terminals.items():
            if (words := block.said.get(f"in {name} shows")) is not None:
                terminal.wait_for(words)

    def _run(self, block: Block, command: str) -> None:
        deadline = time.monotonic() + 60
        while True:
            done = subprocess.run(
                ["bash", "-euc", command],
                cwd=self.checkout.root,
                env=self.checkout.environment,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == int(block.said.get("exit", 0)), f"{block}\n{command}{done.stdout}{done.stderr}"
            if block.said.get("shows", "") in done.stdout:
                return
            assert time.monotonic() < deadline, f"{block} does not show it:\n{done.stdout}{done.stderr}"


def _free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@pytest.fixture
def reader(checkout: Checkout) -> Iterator[Reader]:
    # A developer who followed the tutorial in this checkout has the agent already; the test must pass there too.
    shutil.rmtree(checkout.root / "agents" / "meetings", ignore_errors=True)
    reader = Reader(checkout)
    yield reader
    for terminal in reader.terminals.values():
        terminal.interrupt()
    assert processes_of(checkout.home) == []


@pytest.mark.timeout(600)
def test_the_tutorial_can_be_followed_to_the_letter(reader: Reader):
    assert len(TUTORIAL) > 30
    for block in TUTORIAL:
        reader.do(block)
