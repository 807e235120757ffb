"""`starter.py up`: runs and supervises the embedded stack, and publishes its addresses for other commands."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.markup import escape

from holdfast.authoring.places import missing_folders
from holdfast.cli.output import Refused, err, out
from holdfast.cli.watch import Watch
from holdfast.dev.stack import Stack
from holdfast.settings import stack_file


async def up() -> int:
    """Runs until Ctrl-C or SIGTERM, and returns 0. Raises StackFailed, and Refused when a stack runs here already."""
    home = stack_file().parent.resolve()
    home.mkdir(parents=True, exist_ok=True)
    scripted = not (os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"))
    with only_one(home):
        stack_file().unlink(missing_ok=True)  # left by an `up` that was killed: its addresses are stale
        if wrong := missing_folders():
            raise Refused("; ".join(wrong))
        # Work in flight at Ctrl-C goes on after the next `up`: no need to wait for it.
        stack = Stack(home, {"HOLDFAST_DRAIN_S": "2", **os.environ}, scripted_model=scripted)
        try:
            with cancelled_by_signal():
                out.print(f"[dim]starting; logs in {stack.logs}[/dim]")
                watch = Watch(stack)  # files saved from here on may be newer than what the workers have read
                await stack.start()
                stack.publish()
                _announce(stack)
                await watch.run()
        except asyncio.CancelledError:
            out.print("\nstopping …")
        finally:
            stack_file().unlink(missing_ok=True)
            stack.stop()
        out.print("stopped; the next `up` continues the same runs")
    return 0


@contextmanager
def cancelled_by_signal() -> Iterator[None]:
    """While active, the first SIGINT or SIGTERM cancels the current task at its next await; later ones do nothing.

    So no signal can interrupt the clean-up, or fall between the start of a process and its registration.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    asked = False

    def stop() -> None:
        nonlocal asked
        if not asked:
            asked = True
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    yield


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Holds the lock of this state directory; the kernel releases it when the process ends."""
    with (home / "up.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            where = f"process {lock.read().strip()}"
            with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # not there yet, or broken
                where += f", Web UI {json.loads(stack_file().read_text())['HOLDFAST_UI_URL']}"
            raise Refused(
                f"a stack runs here already ({where}, state in {home}): use it, stop it with Ctrl-C, "
                "or set HOLDFAST_HOME to another directory"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def running_stack(home: Path) -> str | None:
    """The process id of the `up` that runs here; None when none does."""
    try:
        with only_one(home):
            return None
    except Refused:
        return (home / "up.lock").read_text().strip()


def _announce(stack: Stack) -> None:
    """Prints the addresses of the stack."""
    if stack.codec_url:
        out.print(f"codec      {stack.codec_url}: sign in there with HOLDFAST_CODEC_TOKEN to read runs in the Web UI")
    model = "scripted and SIMULATED (set OPENAI_API_KEY or OPENAI_BASE_URL for a real one)"
    out.print(f"Web UI     [bold]{stack.ui_url}[/bold]")
    out.print(f"Temporal   {stack.temporal_address}")
    out.print(f"hospital   {stack.hospital_url} (simulated)")
    out.print(f"model      {model if stack.scripted_model else 'as OPENAI_* and HOLDFAST_MODEL say'}")
    out.print("""try        uv run starter.py run discharge --input '{"patient_id": "pat-1"}' --follow""")
    if "TEMPORAL_ADDRESS" in os.environ:
        err.print("[yellow]note: TEMPORAL_ADDRESS names another server, which this stack does not use[/yellow]")
    if secrets := " and ".join(stack.published["stack_secrets"]):
        words = f"the stack does not publish the secrets of {secrets}: set them in other terminals too"
        err.print(f"[yellow]note: {words}[/yellow]")
    for broken in {each: None for worker in stack.workers for each in worker.not_served}:
        err.print(f"[yellow]broken and not served:[/yellow] {escape(broken)}; correct and save the file")
    out.print("[dim]ready; Ctrl-C stops the stack[/dim]")
