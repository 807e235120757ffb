"""`python -m bench.load`: 200 agents in 8 processes share one rate limit; a service counts what arrives.

Exit status: 0 when every claim held, 1 when one did not, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import isnan
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.load.load import LOADS, Load, Report, run
from holdfast.state.schema import migrate
from tests.fixtures.store import STOP, PostgresForTests

HEADS = (
    "store", "load", "most requests/min", "most tokens/min", "rate used", "429", "calls", "per agent", "longest wait",
    "questions/call", "answer",
)  # fmt: skip
console = Console(width=160)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.load", description="Many agents in many processes on one rate limit.")
    parser.add_argument("--store", choices=["sqlite", "postgresql", "both"], default="both")
    parser.add_argument("--load", choices=[load.name for load in LOADS], help="one only")
    parser.add_argument("--seconds", type=float, default=150.0, help="of each load (default: 150)")
    options = parser.parse_args()
    stores = ["sqlite", "postgresql"] if options.store == "both" else [options.store]
    loads = [replace(load, seconds=options.seconds) for load in LOADS if options.load in (None, load.name)]
    table, wrong = Table(*HEADS), []
    for store in stores:
        for load in loads:
            with console.status(f"{load.name}, on {store}: {load.seconds:.0f} s"), _store(store) as url:
                report = asyncio.run(run(load, url))
            table.add_row(store, *_cells(load, report))
            wrong += [f"{store}, {load.name}: {words}" for words in report.failures()]
    console.print(table)
    for words in wrong:
        console.print(f"[red]does not hold[/]: {words}")
    return 1 if wrong else 0


def _cells(load: Load, report: Report) -> list[str]:
    return [
        load.name,
        f"{report.most[0]} of {load.requests}",
        f"{report.most[1]} of {load.tokens}",
        "too short" if isnan(report.used) else f"{report.used:.1%}",
        str(report.refused),
        str(report.calls),
        f"{report.least_agent} to {report.most_agent}",
        f"{report.longest_wait_s:.1f} s",
        f"{report.asked_per_call:.1f}",
        f"{report.answer_ms:.1f} ms",
    ]


@contextmanager
def _store(kind: str) -> Iterator[str]:
    """Address of a new, migrated store."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory(prefix="holdfast-load-") as home:
            migrate(url := f"sqlite:///{home}/store.db")
            yield url
        return
    home = Path(tempfile.gettempdir()) / f"holdfast-load-pg-{os.getpid()}"
    stopper = subprocess.Popen(["sh", "-c", STOP, str(home)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        migrate(url := PostgresForTests(home).create("load"))
        yield url
    finally:
        stopper.communicate()


if __name__ == "__main__":
    sys.exit(main())
