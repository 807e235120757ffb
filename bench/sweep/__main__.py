"""`uv run poe sweep`: kills and freezes a worker at every crash point at every step of discharge runs.

Exit status: 0 when everything held, 1 for a violation or a point that no run reaches, 2 for wrong use.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.sweep.cases import BOUND_S, Case, Mode, cases, unreached
from bench.sweep.environment import Lane, Servers
from bench.sweep.sweep import RECOVERY_S, SETTLED_S, SIGNAL_S, Report, traces, try_case
from holdfast.reliability.crash_points import Point
from tests.fixtures.store import STOP, PostgresForTests

STORES = ("sqlite", "postgresql")
PAGE = Path("docs/explanation/kill-sweep.md")
BEGIN, END = "<!-- table: written by `uv run poe sweep --write-docs` -->", "<!-- end of table -->"
HEADS = (
    "point",
    "where",
    "killed",
    "frozen",
    "right",
    "settled by a person",
    "paid twice",
    "slowest kill",
    "slowest freeze",
)

console = Console()


def main() -> int:
    options = _options()
    modes = list(Mode) if options.mode == "both" else [Mode(options.mode)]
    stores = list(STORES) if options.store == "both" else [options.store]
    if options.write_docs and (options.only or len(modes) + len(stores) != 4):
        console.print("--write-docs needs the whole sweep: no --only, --store both, --mode both")
        return 2
    home = Path(tempfile.mkdtemp(prefix="holdfast-sweep-"))
    begun = time.monotonic()
    try:
        with _store_urls(stores, home) as urls:
            reports, missing = asyncio.run(_sweep(home, urls, modes, options.only, options.lanes))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("stopped; nothing is left running")
        return 130
    finally:
        shutil.rmtree(home, ignore_errors=True)
    wrong = [report for report in reports if report.violations]
    took = f"{len(reports)} cases in {time.monotonic() - begun:.0f} s, {len(wrong)} with violations"
    _show(reports, missing, took)
    if options.json:
        options.json.write_text(json.dumps([_json(report) for report in reports], indent=1) + "\n")
    if options.write_docs and not (wrong or missing):
        _write_page(reports)
    return 1 if wrong or missing or not reports else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="poe sweep", description="Kills and freezes workers at every crash point.")
    parser.add_argument("--store", choices=[*STORES, "both"], default="both")
    parser.add_argument("--mode", choices=[*Mode, "both"], default="both")
    parser.add_argument("--only", metavar="POINT", help="a flow, a point, POINT@WHERE, or the beginning of one")
    parser.add_argument("--lanes", type=int, default=3, help="cases at a time (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every case there")
    parser.add_argument("--write-docs", action="store_true", help=f"write the table into {PAGE}")
    return parser.parse_args()


@contextmanager
def _store_urls(stores: Sequence[str], home: Path) -> Iterator[dict[str, str]]:
    """Addresses of new stores by name; Postgres is started when it is wanted, and ended."""
    urls = {"sqlite": f"sqlite:///{home / 'store.db'}"} if "sqlite" in stores else {}
    if "postgresql" not in stores:
        yield urls
        return
    # Not under `home`: the server gives up root's rights and then has to pass through all folders above.
    postgres = Path(tempfile.gettempdir()) / f"holdfast-sweep-pg-{os.getpid()}"
    stopper = subprocess.Popen(["sh", "-c", STOP, str(postgres)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield urls | {"postgresql": PostgresForTests(postgres).create("sweep")}
    finally:
        stopper.communicate()


async def _sweep(
    home: Path, urls: dict[str, str], modes: Sequence[Mode], only: str | None, lanes: int
) -> tuple[list[Report], list[Point]]:
    """All cases on all stores, `lanes` at a time; their reports, and the points that no undisturbed run reaches."""
    me = asyncio.current_task()
    assert me is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, me.cancel)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    async with Servers.open(home, urls) as servers:
        first = await servers.lane()
        with bar:
            passed = await traces(servers, first, next(iter(urls)))
            missing = unreached(passed)
            todo: asyncio.Queue[tuple[str, Case]] = asyncio.Queue()
            for mode in modes:
                for case in cases(passed, mode):
                    if only == case.flow or f"{case.point}@{case.where}".startswith(only or ""):
                        for store in urls:
                            todo.put_nowait((store, case))
            task = bar.add_task("sweep", total=todo.qsize())
            reports: list[Report] = []

            async def work(lane: Lane) -> None:
                while not todo.empty():
                    store, case = todo.get_nowait()
                    bar.update(task, description=f"{case} on {store}")
                    report = await try_case(servers, lane, store, case)
                    reports.append(report)
                    for each in report.violations:
                        console.print(f"[red]{case} on {store}[/]: {escape(each)}")
                    if report.log:
                        console.print(escape(report.log), style="dim")
                    bar.advance(task)

            others = [await servers.lane() for _ in range(min(lanes, todo.qsize()) - 1)]
            async with asyncio.TaskGroup() as group:
                for lane in [first, *others]:
                    group.create_task(work(lane))
    return reports, missing


def _rows(reports: Sequence[Report]) -> Iterator[tuple[str, ...]]:
    for point in Point:
        of = [report for report in reports if report.case.point is point]
        if not of:
            continue
        kills, freezes = ([r for r in of if r.case.mode is mode] for mode in Mode)
        yield (
            point.value,
            ", ".join(_places(of)),
            str(len(kills)),
            str(len(freezes)),
            f"{sum(not r.violations for r in of)} of {len(of)}",
            str(sum(r.settled for r in of)),
            str(sum(r.repeats for r in of)),
            _slowest(kills),
            _slowest(freezes),
        )


def _places(reports: Sequence[Report]) -> list[str]:
    return list(dict.fromkeys(sorted(r.case.place for r in reports)))


def _slowest(reports: Sequence[Report]) -> str:
    found = max((r.recovery_s for r in reports if r.recovery_s is not None), default=None)
    return "–" if found is None else f"{found:.1f} s"


def _show(reports: Sequence[Report], missing: Sequence[Point], took: str) -> None:
    table = Table(*HEADS, title="Kill sweep")
    for row in _rows(reports):
        table.add_row(*row)
    console.print(table)
    for mode in Mode:
        of = [r for r in reports if r.case.mode is mode]
        for store in sorted({r.store for r in of}):
            times = [r.seconds for r in of if r.store == store]
            console.print(f"{mode} on {store}: {len(times)} cases, {sum(times) / len(times):.1f} s each on average")
    for line in _recoveries(reports):
        console.print(line)
    for report in reports:
        for each in report.violations:
            console.print(f"[red]violated[/] {report.case} on {report.store}: {escape(each)}")
    for point in missing:
        console.print(f"[red]never reached[/]: {point}")
    console.print(took)


def _recoveries(reports: Sequence[Report]) -> Iterator[str]:
    kills = [r for r in reports if r.case.mode is Mode.KILL]
    parked = [r for r in kills if r.case.point is Point.WAITING]
    working = [r for r in kills if r not in parked]
    late = max((r for r in working if r.recovery_s), key=lambda r: r.recovery_s or 0, default=None)
    start = f", where the other worker took {late.ready_s:.1f} s to start" if late and late.ready_s else ""
    yield f"Slowest recovery of work in flight after a kill: {_slowest(working)} (to reach: {RECOVERY_S:g} s){start}"
    yield f"Slowest answer of a parked run to a Signal after a kill: {_slowest(parked)} (to reach: {SIGNAL_S:g} s)"
    if doubts := [r.settled_s for r in kills if r.settled_s is not None]:
        after = f"{min(doubts):.1f} to {max(doubts):.1f} s after a kill"
        yield f"A message in doubt is settled {after} (bound: {BOUND_S:g} s; to reach: {SETTLED_S:g} s)"


def _json(report: Report) -> dict[str, object]:
    case = report.case
    what = {"mode": case.mode, "flow": case.flow, "point": case.point, "where": case.where}
    return what | {name: value for name, value in vars(report).items() if name not in ("case", "log")}


def _write_page(reports: Sequence[Report]) -> None:
    lines = [f"| {' | '.join(HEADS)} |", "|" + " --- |" * len(HEADS)]
    lines += [f"| {' | '.join(row)} |" for row in _rows(reports)]
    right = sum(not r.violations for r in reports)
    lines += [
        "",
        f"One run on {time.strftime('%Y-%m-%d')}: {len(reports)} cases on {' and '.join(STORES)}, {right} right.",
    ]
    lines += [f"{line}." for line in _recoveries(reports)] + [""]
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text("\n".join([head + BEGIN, "", *lines, END + rest.partition(END)[2]]))
    console.print(f"written: {PAGE}")


if __name__ == "__main__":
    sys.exit(main())
