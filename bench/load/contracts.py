"""`python -m bench.load.contracts`: the contract batch over hundreds of real licence texts, its workers killed.

First without a kill, then with each worker of each stage killed once by SIGKILL, at random; what came of both is
compared file by file and counted in the ledger and at the model. Then documents a minute by 1, 2 and 4 workers.
Exit status: 0 when every claim held, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agents.contracts.collect import collect
from bench.load.__main__ import _store
from bench.load.batches import STAGES, Field, Outcome, claims, kills
from holdfast.cli.output import print_json
from holdfast.contracts.data import Json

console = Console(width=120, stderr=True)


async def proof(
    home: Path, folder: Path, store: str, workers: int, seed: int, think_s: float
) -> tuple[Outcome, Outcome, Json]:
    """The batch without and with kills, and what holds of them."""
    async with Field.open(home, store, think_s) as field:
        for stage in STAGES:
            await field.hire(stage, workers)
        with console.status("without kills"):
            calm = await field.batch("calm", folder)
        assert calm.result.items is not None
        deaths = kills(calm.result.items.done, workers, seed)
        with console.status(f"with {len(deaths)} kills"):
            killed = await field.batch("killed", folder, deaths)
    return calm, killed, claims(calm, killed, len(deaths))


async def speed(home: Path, folder: Path, store: str, workers: int, think_s: float, of: str) -> Outcome:
    """The batch with so many workers, each of which serves everything; of: with so many of this stage.

    Those do one call at a time, so that the stage is what holds up the others.
    """
    async with Field.open(home, store, think_s) as field:
        for stage in STAGES if of else ("",):
            narrow = {"HOLDFAST_SLOTS": "1"} if stage == of and of else {}
            await field.hire(stage, workers if stage in ("", of) else 1, **narrow)
        with console.status(f"{workers} workers"):
            return await field.batch("speed", folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.load.contracts", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--workers", type=int, default=3, help="of each stage, for the proof (default: 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the kills")
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="postgresql")
    parser.add_argument("--kill", action="store_true", help="the proof only")
    parser.add_argument("--speed", metavar="N,N,…", help="the speed by so many workers only (default: 1,2,4)")
    parser.add_argument(
        "--of", choices=STAGES[1:], default="", help="speed: of this stage, with one call at a time each"
    )
    parser.add_argument("--think", type=float, default=0.15, help="seconds that the model takes (default: 0.15)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    told: Json = {"documents": options.documents, "store": options.store, "load": os.getloadavg()[0]}
    table = Table("run", "documents", "seconds", "a minute", "model calls", "again after a kill", "events", "kB")
    held: Json = {}

    def note(name: str, outcome: Outcome) -> None:
        items = outcome.result.items
        assert items is not None
        events, size = outcome.history
        told[name] = {"done": items.done, "failed": items.failed, "seconds": round(outcome.seconds, 1)}
        told[name] |= {"per_minute": round(outcome.per_minute), "killed": outcome.killed, "asked": outcome.asked}
        told[name] |= {"repeated": outcome.repeated, "recorded": outcome.recorded, "events": events, "bytes": size}
        counts = f"{items.done} + {items.failed} refused" if items.failed else str(items.done)
        cells = (outcome.seconds, outcome.per_minute, outcome.asked, outcome.repeated, events, size / 1000)
        table.add_row(name, counts, *(f"{cell:,.0f}" for cell in cells))

    with tempfile.TemporaryDirectory(prefix="holdfast-contracts-") as place:
        home, folder = Path(place), Path(place) / "texts"
        found = collect(folder, options.documents)
        console.print(f"{found} texts of this machine; load {os.getloadavg()[0]:.1f}")
        if not options.speed:
            with _store(options.store) as url:
                arguments = (home / "proof", folder, url, options.workers, options.seed, options.think)
                calm, killed, held = asyncio.run(proof(*arguments))
            note("without kills", calm)
            note(f"{killed.killed} kills", killed)
        for workers in () if options.kill else map(int, (options.speed or "1,2,4").split(",")):
            with _store(options.store) as url:
                arguments = (home / f"speed-{workers}", folder, url, workers, options.think, options.of)
                outcome = asyncio.run(speed(*arguments))
            note(f"{workers} {options.of} worker{'s' * (workers > 1)}".replace("  ", " "), outcome)
    if options.json:
        print_json({**told, "payloads": held})
    else:
        Console(width=120).print(table)
    for words, holds in held.items():
        console.print(f"  [{'green' if holds else 'red'}]{'✓' if holds else '✗'}[/] {words}", highlight=False)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
