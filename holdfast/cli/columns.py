"""Formats the lines of `list`. The columns are always the same, and no cell is cut.

In a pipe each run is one line of any length, and an empty cell is a dash. At a terminal that is too narrow, the run's
id gets a separate line: a cut id could not be copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from holdfast.cli.output import seconds
from holdfast.cli.view import COLOURS
from holdfast.contracts.data import Json

HEADINGS = ("run", "agent", "status", "stage", "started", "took")
GAP = 2
INDENT = 4


def clock(epoch: float) -> str:
    return datetime.fromtimestamp(epoch).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def room(console: Console) -> int | None:
    """The width of a line at this terminal, in cells; None in a pipe."""
    return console.width if console.is_terminal else None


def row(run: Json, now: float, *, short: bool) -> tuple[str, ...]:
    """The cells of a run that `list` shows. short: times in a short form, for a person at a terminal."""
    took = max(0.0, (run["ended_at"] or now) - run["started_at"])
    started, span = clock(run["started_at"]), seconds(took)
    if short:
        day, time = started.split(" ")
        today, year = clock(now).split(" ")[0], clock(now)[:5]
        started = time if day == today else f"{day.removeprefix(year)} {time[:5]}"
        span = span.replace(" min", "m").replace(" ", "")
    cells = run["workflow_id"], run["agent"], run["status"], run["stage"], started, span
    # A control character could steer the terminal, a line break would begin another row.
    return tuple("".join(c if c.isprintable() else "\ufffd" for c in each) or "-" for each in cells)


def lines(rows: Sequence[tuple[str, ...]], width: int | None) -> Iterator[Text]:
    """The heading, then each run. width: of a line, in cells; None: no limit."""
    table = [HEADINGS, *rows]
    widths = [max(cell_len(each[n]) for each in table) for n in range(len(HEADINGS))]
    fits = width is None or sum(widths) + GAP * (len(widths) - 1) <= width
    for number, cells in enumerate(table):
        style = "dim" if number == 0 else COLOURS.get(cells[2], "cyan")
        parts = [Text(cell + " " * (widths[n] - cell_len(cell) + GAP)) for n, cell in enumerate(cells)]
        for n in range(len(parts)) if number == 0 else (2,):
            parts[n].stylize(style)
        if fits:
            line = Text.assemble(*parts)
        else:
            line = Text.assemble(cells[0], "\n", " " * INDENT, *parts[1:])
            if number == 0:
                line.stylize("dim")
        line.rstrip()
        yield line
