"""`uv run poe chaos`: discharge runs while processes die, links fail and people contradict each other.

Everything is random by a seed, and judged by the services' own records. Exit status: 0 when everything held, 1 for a
violation, 2 for wrong use, 130 when it was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.chaos.chaos import Report, chaos
from bench.chaos.environment import Postgres

STORES = ("sqlite", "postgresql")
console = Console()


def main() -> int:
    options = _options()
    stores = list(STORES) if options.store == "both" else [options.store]
    console.print(f"seed {options.seed}: {options.runs} runs on {' and '.join(stores)}, {options.at_a_time} at a time")
    reports: list[Report] = []
    try:
        for store in stores:
            reports.append(_on(store, options))
            _show(reports[-1])
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("stopped; nothing is left running")
        return 130
    if options.json:
        options.json.write_text(json.dumps([_json(report) for report in reports], indent=1) + "\n")
    return 1 if any(report.violations for report in reports) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="poe chaos", description="Runs under random failures, judged by the services."
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="default: a new one")
    parser.add_argument("--runs", type=int, default=200, help="on each store (default: 200)")
    parser.add_argument("--at-a-time", type=int, default=20, help="open runs (default: 20)")
    parser.add_argument("--store", choices=[*STORES, "both"], default="both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found there")
    parser.add_argument("--keep", action="store_true", help="keep the files and logs of a chaos run with violations")
    options = parser.parse_args()
    if options.runs < 1 or options.at_a_time < 1:
        parser.error("--runs and --at-a-time take a number from 1")
    return options


def _on(store: str, options: argparse.Namespace) -> Report:
    home = Path(tempfile.mkdtemp(prefix="holdfast-chaos-"))
    report = None
    try:
        with Postgres.open() if store == "postgresql" else nullcontext() as postgres:
            report = asyncio.run(_watched(home, postgres, options))
            return report
    finally:
        if options.keep and (report is None or report.violations):
            console.print(f"files and logs: {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)


async def _watched(home: Path, postgres: Postgres | None, options: argparse.Namespace) -> Report:
    me = asyncio.current_task()
    assert me is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, me.cancel)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with bar:
        task = bar.add_task("chaos", total=options.runs)

        def progress(store: str, ended: int, of: int) -> None:
            bar.update(task, description=f"chaos on {store}", completed=ended, total=of)
            if not console.is_terminal and ended % 50 == 0:  # a log shows no bar
                console.print(f"{store}: {ended} of {of} runs have ended")

        return await chaos(home, postgres, options.seed, options.runs, options.at_a_time, progress)


def _show(report: Report) -> None:
    table = Table(title=f"Chaos on {report.store}, seed {report.seed}", show_header=False)
    kinds = Counter(violation.kind for violation in report.violations)
    table.add_row("runs", f"{report.runs} in {report.seconds:.0f} s, slowest {report.slowest_s:.0f} s")
    table.add_row("outcomes", _counts(report.outcomes))
    table.add_row("disturbances", _counts(report.disturbances))
    table.add_row("people", _counts(report.people))
    table.add_row("model calls repeated", f"{report.calls_repeated}, each cut off before its answer was recorded")
    table.add_row("violations", _counts(kinds) or "none")
    console.print(table)
    for violation in report.violations:
        console.print(f"[red]{violation.kind}[/] {escape(violation.workflow_id)}: {escape(violation.words)}")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def _json(report: Report) -> dict[str, Any]:
    return vars(report) | {"violations": [vars(violation) for violation in report.violations]}


if __name__ == "__main__":
    sys.exit(main())
