"""`python -m bench.load.breaker`: sixteen processes hammer one dead service; the service counts what arrives.

First it answers 503 for a while. Then it hangs, and the process whose call is the probe is killed in the middle of it:
its call comes back in a new process. Of the next probe the process is frozen, and its call comes back nowhere. At last
the service is well, and the frozen process wakes.

Exit status: 0 when every claim held, 1 when one did not.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2
from rich.console import Console

from bench.load.callers import TARGET, Orders
from holdfast.dev.simulation.hospital import HospitalRecord, RequestRow
from holdfast.reliability.breaker import Breaker, Row
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database
from holdfast.state.opening import open_database
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.services import service

START_S = 3.0
"""For a Python process to start on a busy machine."""


@dataclass(frozen=True)
class Hammering:
    """The service is dead for `dead_s` and then hangs; times in seconds."""

    processes: int = 16
    dead_s: float = 70.0
    probe_after_s: float = 30.0
    timeout_s: float = 5.0
    lease_s: float = 12.0
    slack_s: float = 0.25
    """What clocks, and the way from the leave to call to the service's record, may take off a span."""
    late_s: float = 2.0
    """Within this somebody has to do what is due."""


@dataclass
class Report:
    hammering: Hammering
    early: int = 0
    """Calls that arrived before the breaker was open and those in flight then."""
    probes: list[float] = field(default_factory=list)
    """While the service is dead: when a probe arrived, in seconds since the breaker opened."""
    takeover_s: float = 0.0
    """From killing the prober to the arrival of the same call, tried again."""
    after_kill_s: float = 0.0
    """From the killed probe to the next one by another call."""
    after_freeze_s: float = 0.0
    recovered_s: float = 0.0
    """From the service being well to the breaker closed."""
    woken: str = ""
    """The breaker's state after the frozen process has woken."""

    def failures(self) -> list[str]:
        """The claims that do not hold."""
        each = self.hammering
        allowed = 3 + each.processes - 1
        gaps = [b - a for a, b in zip([0.0, *self.probes], self.probes, strict=False)]
        shortest, longest = each.probe_after_s - each.slack_s, each.probe_after_s + each.late_s
        claims = {
            f"{self.early} calls before it was open, at most {allowed} can be": self.early > allowed,
            f"{len(self.probes)} probes in {each.dead_s:g} s": len(self.probes) > each.dead_s / each.probe_after_s,
            f"probes came {_list(gaps)} s apart": any(not shortest <= gap <= longest for gap in gaps),
            f"a killed probe was tried again only after {self.takeover_s:.1f} s": self.takeover_s
            > START_S + each.late_s,
            f"the next probe came {self.after_kill_s:.1f} s after the one killed": self.after_kill_s < shortest,
            f"the next probe came {self.after_freeze_s:.1f} s after the one frozen": not (
                shortest <= self.after_freeze_s <= max(each.probe_after_s, each.lease_s) + each.late_s
            ),
            f"well again, the breaker closed only after {self.recovered_s:.1f} s": self.recovered_s
            > each.probe_after_s + each.timeout_s + each.late_s,
            f"after the frozen prober woke the breaker was {self.woken}": self.woken != "closed",
        }
        return [words for words, wrong in claims.items() if wrong]


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


async def run(hammering: Hammering, store: str, home: Path) -> Report:
    """The story on a migrated store. The hospital's record stays in `home`."""
    with service("hospital", home / "hospital.db") as hospital, ExitStack() as ends:
        record = HospitalRecord(hospital.db)
        orders = Orders(store, hospital.url, hammering.probe_after_s, hammering.timeout_s, hammering.lease_s)
        db = await open_database(store)
        try:
            async with httpx2.AsyncClient(base_url=hospital.url, timeout=PATIENCE_S) as http:
                await http.put("/faults/records", json={"mode": "fail", "status": 503})
                workers = [ends.enter_context(_worker(orders)) for _ in range(hammering.processes)]
                by_pid = {str(worker.pid): worker for worker in workers}
                return await _Story(hammering, orders, db, record, http, ends, by_pid).tell()
        finally:
            await db.close()


@dataclass
class _Story:
    hammering: Hammering
    orders: Orders
    db: Database
    record: HospitalRecord
    http: httpx2.AsyncClient
    ends: ExitStack
    workers: dict[str, subprocess.Popen[bytes]]
    """By what the keys of their calls begin with."""

    async def tell(self) -> Report:
        report = Report(self.hammering)
        await self._dead(report)
        await self.http.put("/faults/records", json={"mode": "hang"})
        await self._killed(report)
        frozen = await self._frozen(report)
        await self.http.delete("/faults")
        await self._well(report, frozen)
        return report

    async def _dead(self, report: Report) -> None:
        opened_at = (await self._until_state("open")).since
        assert opened_at is not None
        await asyncio.sleep(self.hammering.dead_s - (time.time() - opened_at))
        since = [request.at - opened_at for request in self.record.requests()]
        first_probe = self.hammering.probe_after_s / 2  # whatever comes later is no call in flight
        report.early = sum(at < first_probe for at in since)
        report.probes = [at for at in since if at >= first_probe]

    async def _killed(self, report: Report) -> None:
        probe = await self._hanging()
        self._process(probe).kill()
        killed_at = time.time()
        # As Temporal does: the activity is tried again elsewhere, under the same key.
        process = self.ends.enter_context(_worker(replace(self.orders, first_key=probe.key)))
        self.workers |= {probe.key.partition("/")[0]: process, str(process.pid): process}
        again = await self._until(lambda: [r for r in self._since(probe) if r.key == probe.key])
        report.takeover_s = again[0].at - killed_at
        following = await self._until(lambda: [r for r in self._since(probe) if r.key != probe.key])
        report.after_kill_s = following[0].at - probe.at

    async def _frozen(self, report: Report) -> RequestRow:
        probe = await self._hanging()
        self._process(probe).send_signal(signal.SIGSTOP)
        following = await self._until(lambda: self._since(probe))
        report.after_freeze_s = following[0].at - probe.at
        return probe

    async def _well(self, report: Report, frozen: RequestRow) -> None:
        well_at = time.time()
        closed = await self._until_state("closed")
        assert closed.since is not None
        report.recovered_s = closed.since - well_at
        self._process(frozen).send_signal(signal.SIGCONT)
        # It has reported, late, when its call has been answered under its key.
        await self._until(lambda: [r for r in self.record.requests(frozen.key) if r.status == 200])
        row = await self._row()
        report.woken = row.state if row else "gone"

    # ------------------------------------------------------------------ looking

    async def _hanging(self) -> RequestRow:
        """The request of a probe that has just arrived and hangs."""
        known = self.record.requests()[-1]
        arrived = await self._until(lambda: self._since(known))
        return arrived[-1]

    def _since(self, known: RequestRow) -> list[RequestRow]:
        return [request for request in self.record.requests() if request.id > known.id]

    def _process(self, request: RequestRow) -> subprocess.Popen[bytes]:
        return self.workers[request.key.partition("/")[0]]

    async def _row(self) -> Row | None:
        rows = await Breaker(self.db, StoreClock(self.db)).rows()
        return next((row for row in rows if row.target == TARGET), None)

    async def _until_state(self, state: str) -> Row:
        async with asyncio.timeout(60 + 3 * self.hammering.probe_after_s):
            while (row := await self._row()) is None or row.state != state:
                await asyncio.sleep(0.02)
            return row

    async def _until(self, look: Callable[[], list[RequestRow]]) -> list[RequestRow]:
        async with asyncio.timeout(60 + 3 * self.hammering.probe_after_s):
            while not (found := look()):
                await asyncio.sleep(0.02)
            return found


@contextmanager
def _worker(orders: Orders) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", "bench.load.callers", orders.argument()])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def main() -> int:
    from bench.load.__main__ import _store

    parser = argparse.ArgumentParser(prog="bench.load.breaker", description="Many processes, one dead service.")
    parser.add_argument("--store", choices=["sqlite", "postgresql", "both"], default="both")
    parser.add_argument("--seconds", type=float, default=70.0, help="for which the service is dead (default: 70)")
    options = parser.parse_args()
    hammering, console, wrong = Hammering(dead_s=options.seconds), Console(width=120), []
    for store in ["sqlite", "postgresql"] if options.store == "both" else [options.store]:
        with _store(store) as url, tempfile.TemporaryDirectory(prefix="holdfast-breaker-") as home:
            report = asyncio.run(run(hammering, url, Path(home)))
        console.print(f"[bold]{store}[/], {hammering.processes} processes")
        console.print(f"  before it was open, and in flight then    {report.early} calls")
        console.print(f"  probes, in seconds since it opened        {_list(report.probes)}")
        console.print(
            f"  prober killed: tried again; next probe    {report.takeover_s:.1f} s; {report.after_kill_s:.1f} s"
        )
        console.print(f"  prober frozen: next probe                 {report.after_freeze_s:.1f} s")
        console.print(f"  service well: breaker closed              {report.recovered_s:.1f} s")
        console.print(f"  frozen prober woken: breaker is           {report.woken}")
        wrong += [f"{store}: {words}" for words in report.failures()]
    for words in wrong:
        console.print(f"[red]does not hold[/]: {words}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
