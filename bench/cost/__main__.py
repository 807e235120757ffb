"""What durability costs: a bare Temporal loop and a Holdfast agent do the same work, in one run, taking turns.

Both ask the same model endpoint, which has no think time, through the same client, with the same worker settings, on
one Temporal server in memory. Ours stands twice: the spine (effect ledger, a checkpoint each turn, heartbeats,
circuit breakers), and with rate limits on model, service and tool besides.
Other work on the machine blurs the figures; the ratios suffer least. Prints a Markdown table with the targets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.cost.profiling import profiled
from bench.cost.services import LIMITS, SERVER_FLAGS, Services, SideFailed, SideProcess, services
from holdfast.dev.stack import StackFailed

BARE = "bare"
ALL_ON = ", all on"
"""Ends the name of a side that keeps dual rate limits of the model, the service and the tool as well."""
LONG = (5, 50, 100, 200)
"""Turns of the long run at which the history's growth is looked at."""
WINDOW = 5


@dataclass(frozen=True)
class Plan:
    rounds: int = 9
    loads: int = 3
    agents: int = 50
    turns: int = 20
    signals: int = 11
    long: tuple[int, ...] = LONG


QUICK = Plan(rounds=3, loads=1, signals=5)


@dataclass
class Figures:
    """What was measured of one side, each list in the order of the rounds."""

    alone: list[float] = field(default_factory=list)
    """Seconds of one agent alone."""
    load: list[dict[str, Any]] = field(default_factory=list)
    """Seconds, CPU seconds of worker and services, peak memory; all agents at once."""
    short: dict[str, Any] = field(default_factory=dict)
    long: dict[str, Any] = field(default_factory=dict)
    """Histories of a run of the usual turns and of a long one."""
    signals: list[float] = field(default_factory=list)
    """Milliseconds from a Signal to the next activity."""


@dataclass(frozen=True)
class Target:
    what: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@asynccontextmanager
async def running(plan: Plan, stores: Sequence[str]) -> AsyncIterator[tuple[Services, list[SideProcess]]]:
    """All sides, up and warm, the bare one first. Raises SideFailed or StackFailed."""
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as home:
        async with services(Path(home)) as around:
            sides = [around.side(BARE, "bare")]
            try:
                for store in stores:
                    sides.append(around.side(store, "agent", around.store(store)))
                    sides.append(around.side(store + ALL_ON, "agent", around.store(store), LIMITS))
                for side in sides:
                    side.answer()  # ready
                    side.ask("run", agents=1, turns=plan.turns)
                yield around, sides
            finally:
                for side in sides:
                    side.stop()


async def measure(plan: Plan, stores: Sequence[str]) -> dict[str, Figures]:
    """Runs everything; the figures by side."""
    async with running(plan, stores) as (around, sides):
        found = {side.name: Figures() for side in sides}
        for _ in range(plan.rounds):
            for side in random.sample(sides, len(sides)):
                found[side.name].alone.append(side.ask("run", agents=1, turns=plan.turns)["seconds"])
        for side in sides:
            found[side.name].signals = side.ask("signal", runs=plan.signals, turns=plan.turns)["ms"]
            found[side.name].short = side.ask("history", turns=plan.turns)
        for _ in range(plan.loads):
            for side in random.sample(sides, len(sides)):
                before = around.cpu()
                run = side.ask("run", agents=plan.agents, turns=plan.turns)
                run["services"] = {name: cpu - before[name] for name, cpu in around.cpu().items()}
                found[side.name].load.append(run)
        for side in sides:
            found[side.name].long = side.ask("history", turns=plan.long[-1])
        return found


async def profile(plan: Plan, stores: Sequence[str], folder: Path) -> None:
    """Prints where each side's worker spends its CPU under load."""
    async with running(plan, stores) as (_, sides):
        for side in sides:
            file = folder / f"{side.name}.txt"
            with profiled(side.pid, file) as shares:
                cpu = side.ask("run", agents=plan.agents, turns=plan.turns)["cpu"] / plan.agents / plan.turns * 1e3
            rows = [(part, f"{share:.1%}", f"{share * cpu:.2f}") for part, share in shares.items()]
            print(f"\n{table([(f'{side.name}: worker CPU', 'share', 'ms/turn'), *rows])}\n\nStacks: {file}")


# ------------------------------------------------------------------ what the figures say


def per_turn(long: dict[str, Any], turn: int) -> float:
    """Bytes of history of a turn: the median of the turns up to it, for continue-as-new happens between two."""
    return median(long["by_turn"][max(0, turn - WINDOW) : turn])


def summary(plan: Plan, one: Figures) -> dict[str, float]:
    """A side's figures in the units of the table."""
    turns = plan.agents * plan.turns
    cpu = {name: median(run["services"][name] for run in one.load) / turns * 1e3 for name in one.load[0]["services"]}
    return {
        "alone, ms": median(one.alone) * 1e3,
        "alone, lowest ms": min(one.alone) * 1e3,
        "alone, highest ms": max(one.alone) * 1e3,
        "load, turns/s": turns / median(run["seconds"] for run in one.load),
        "worker CPU, ms/turn": median(run["cpu"] for run in one.load) / turns * 1e3,
        **{f"{name} CPU, ms/turn": value for name, value in cpu.items()},
        "worker peak memory, MB": max(run["rss_mb"] for run in one.load),
        "history, events/turn": one.short["events"] / plan.turns,
        "history, bytes/turn": one.short["bytes"] / plan.turns,
        **{f"bytes at turn {turn}": per_turn(one.long, turn) for turn in plan.long},
        f"bytes/turn over {plan.long[-1]} turns": one.long["bytes"] / plan.long[-1],
        f"executions for {plan.long[-1]} turns": one.long["executions"],
        "signal to next activity, p50 ms": median(one.signals),
        "signal to next activity, max ms": max(one.signals),
    }


def targets(plan: Plan, bare: Figures, ours: Figures) -> list[Target]:
    """What was promised, and what came out."""
    theirs, mine = summary(plan, bare), summary(plan, ours)
    first = per_turn(ours.long, plan.long[0])
    growth = max(*(per_turn(ours.long, turn) for turn in plan.long), mine[f"bytes/turn over {plan.long[-1]} turns"])
    return [
        Target("alone, × bare", mine["alone, ms"] / theirs["alone, ms"], 1.25),
        Target("load, × bare", mine["load, turns/s"] / theirs["load, turns/s"], 0.8, at_least=True),
        Target("history bytes/turn, × bare", mine["history, bytes/turn"] / theirs["history, bytes/turn"], 0.42),
        Target(f"history growth, turn {plan.long[0]} to {plan.long[-1]}, ×", growth / first, 1.1),
        Target("signal to next activity, p50 ms", mine["signal to next activity, p50 ms"], 50),
        Target("worker peak memory, MB", mine["worker peak memory, MB"], 180),
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head, the first column text."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    cells = [[cell.rjust(widths[n]) if n else cell.ljust(widths[n]) for n, cell in enumerate(row)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    rule = "|" + "|".join("-" * (w + 1) + (":" if n else "-") for n, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def report(plan: Plan, found: dict[str, Figures]) -> str:
    sums = {name: summary(plan, one) for name, one in found.items()}
    head = ["", *(name if name == BARE else f"Holdfast, {name}" for name in sums)]
    measures = list(dict.fromkeys(measure for one in sums.values() for measure in one))
    rows = [[m, *(_figure(one[m]) if m in one else "–" for one in sums.values())] for m in measures]
    ours = [name for name in found if name != BARE]
    goals = {name: targets(plan, found[BARE], found[name]) for name in ours}
    verdicts = [
        [row[0].what, *(f"{_bound(goal)}: {goal.measured:.2f} {'met' if goal.met else 'MISSED'}" for goal in row)]
        for row in zip(*goals.values(), strict=True)
    ]
    flags = ", ".join(f"{flag}={value}" for flag, value in SERVER_FLAGS.items())
    return "\n\n".join([
        f"One agent of {plan.turns} turns alone ({plan.rounds} rounds); {plan.agents} agents × {plan.turns} turns"
        f" at once, one worker process ({plan.loads} rounds). Medians. Python {platform.python_version()},"
        f" Temporal dev server in memory with {flags}.",
        table([head, *rows]),
        table([["target", *ours], *verdicts]),
        *(_cost(plan, name, found[name.removesuffix(ALL_ON)], found[name]) for name in ours if name.endswith(ALL_ON)),
    ])  # fmt: skip


def _bound(goal: Target) -> str:
    return f"{'≥' if goal.at_least else '≤'} {goal.limit:g}"


def _cost(plan: Plan, name: str, spine: Figures, ours: Figures) -> str:
    """What the limits add to a call, paired round by round against the same store without them."""
    added = median(on - off for on, off in zip(ours.alone, spine.alone, strict=True))
    calls = 2 * plan.turns - 1  # the last turn makes no tool call
    share = median(ours.alone) / median(spine.alone)
    return f"{name}: {added / calls * 1e3:+.2f} ms a call of model or tool against the spine alone (× {share:.2f})."


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; the ratios are rougher")
    parser.add_argument("--stores", default="sqlite,postgres", help="which stores to pair with the bare loop")
    parser.add_argument("--rounds", type=int, help="rounds of one agent alone")
    parser.add_argument("--loads", type=int, help="rounds of all agents at once")
    parser.add_argument("--agents", type=int, help="agents at once")
    parser.add_argument("--turns", type=int, help="turns of an agent, the last without a tool call")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="only show where each worker's CPU goes under load; needs py-spy (`uv run --with py-spy …`)",
    )
    given = parser.parse_args(arguments)
    plan = QUICK if given.quick else Plan()
    chosen = {name: getattr(given, name) for name in ("rounds", "loads", "agents", "turns") if getattr(given, name)}
    plan = Plan(**{**vars(plan), **chosen})
    stores = given.stores.split(",")
    try:
        if given.profile:
            given.profile.mkdir(parents=True, exist_ok=True)
            asyncio.run(profile(plan, stores, given.profile))
            return 0
        found = asyncio.run(measure(plan, stores))
    except (SideFailed, StackFailed) as error:
        print(error, file=sys.stderr)
        return 1
    print(report(plan, found))
    if given.json:
        sides = {name: vars(one) for name, one in found.items()}
        given.json.write_text(json.dumps({"plan": vars(plan), "sides": sides}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
