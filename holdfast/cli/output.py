"""What the commands write: words for people, JSON for machines, and one line for an error."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

# Wrapped for people at a terminal, one line a line for whatever reads a pipe; tables get the width they need there.
out = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


class Refused(Exception):
    """A command that cannot do what was asked. The message is one line that says what to do; exit status 2."""


def print_json(value: Any) -> None:
    """One JSON value on a line of its own. Models are written out in full, defaults too."""
    print(json.dumps(value, default=_plain, ensure_ascii=False), flush=True)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)


def fail(message: str) -> None:
    """The error line of a command, on stderr and without markup."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def counted(number: int, one: str, many: str = "") -> str:
    """`1 dead letter`, `2 dead letters`. many: the plural, when it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def money(usd: float, unpriced: int = 0) -> str:
    """`$0.0123`; calls without a known price are named and not counted as free."""
    return f"${usd:.4f}" + (f" + {counted(unpriced, 'unpriced call')}" if unpriced else "")


def seconds(value: float) -> str:
    """A span of time for people: `0.8 s`, `3 min 20 s`, `2 d 4 h`."""
    if value < 60:
        return f"{value:.1f} s"
    whole = int(value)
    for unit, size, small, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {small}"
    raise AssertionError
