"""Output of the commands: text for people, JSON for programs, and one line for an error."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from typing import Any

from rich.console import Console as RichConsole

from holdfast.contracts import outside


def _reopen() -> list[str]:
    """Opens the null device for each of stdin, stdout and stderr that is closed, and returns their names.

    Otherwise the next file or connection would get its file descriptor.
    """
    closed = []
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            closed.append(name)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115
    return closed


CLOSED = _reopen()


class Console(RichConsole):
    def on_broken_pipe(self) -> None:
        """Raises the error for `main`. Rich would exit with status 1, which means a failed run."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


# Lines wrap at a terminal only; in a pipe they stay whole, and tables get the width they need.
out = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


LINE = 1200
"""The longest error line, in characters."""


class Refused(Exception):
    """The command cannot do what was asked. The message is one line that says what to do; exit status 2."""


def prepare_streams() -> None:
    """Prepares stdout and stderr at the start of a command. Raises Refused when stdout is closed.

    A character that the terminal's encoding lacks is written as `\\u2713`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if "stdout" in CLOSED:
        raise Refused("stdout is closed: there is nowhere to write to")


def read_stdin(what: str) -> str:
    """Reads all of stdin, for an argument `-`. Raises Refused when it is closed, empty, or not UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode()
    except (OSError, ValueError) as error:
        raise Refused(f"{what} - reads stdin, which cannot be read as text in UTF-8: {error}") from None
    if not text.strip():
        raise Refused(f"{what} - reads stdin, which is closed or empty")
    return text


def parse_json(what: str, text: str, limit: int | None = None) -> Any:
    """Parses JSON from the command line. Raises Refused, naming the option or argument."""
    try:
        return outside.loads(text) if limit is None else outside.loads(text, limit)
    except ValueError as error:
        raise Refused(f"{what} {error}") from None


def print_json(value: Any) -> None:
    """Prints one JSON value on one line. Models include fields with default values."""
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    print(json.dumps(value, default=_plain, ensure_ascii=plain), flush=True)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)


def fail(message: str) -> None:
    """Prints the error line of a command on stderr, without markup. Cuts the middle out of a long line."""
    line = " ".join(message.split())
    if len(line) > LINE:
        line = f"{line[: LINE // 2]} … {line[-LINE // 2 :]}"
    print(f"error: {line}", file=sys.stderr, flush=True)


def counted(number: int, one: str, many: str = "") -> str:
    """`1 dead letter`, `2 dead letters`. many: the plural, when it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def money(usd: float, unpriced: int = 0) -> str:
    """`$0.0123`; names the calls without a known price, which are not counted as free."""
    return f"${usd:.4f}" + (f" + {counted(unpriced, 'unpriced call')}" if unpriced else "")


def seconds(value: float) -> str:
    """A duration as text: `0.8 s`, `3 min 20 s`, `2 d 4 h`."""
    if value < 60:
        return f"{value:.1f} s"
    whole = int(value)
    for unit, size, small, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {small}"
    raise AssertionError
