"""`python -m bench.load.workers`: the whole path. 200 runs in 8 worker processes share the rate limit of one model.

Workers, Temporal server, store and a model endpoint that counts are real processes or sockets; a run that has to wait
sleeps on a durable timer. Takes about four minutes a store. Exit status: 0 when every claim held, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from bench.cost import fake_llm
from bench.cost.services import SideProcess, services
from bench.load.service import Service
from holdfast.authoring.services import Limit
from holdfast.reliability.limit_schedule import SLOT_S, SPAN

PROCESSES = 8
AGENTS = 25
TURNS = 13
PER_MINUTE = 600
TOKENS_A_CALL = 120
"""What `bench.cost.fake_llm` says that every call has used."""
_REFUSED = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
_AGENT = re.compile(rb"Do the work ([\w-]+) in")
console = Console(width=120)


async def run(kind: str) -> list[str]:
    """Runs the load on one store and prints what came of it; the claims that do not hold."""
    service = Service(Limit("model", PER_MINUTE))

    def answer(body: bytes) -> bytes:
        found = _AGENT.search(body)
        assert found is not None
        return fake_llm.answer(body) if service.arrive(found[1].decode(), TOKENS_A_CALL) else _REFUSED

    model = await asyncio.get_running_loop().create_server(lambda: fake_llm.Http(answer), "127.0.0.1", 0)
    address = f"http://127.0.0.1:{model.sockets[0].getsockname()[1]}/v1"
    more = {"OPENAI_BASE_URL": address, "HOLDFAST_MODEL_RPM": str(PER_MINUTE), "HOLDFAST_MODEL_TPM": "10000000"}
    sides: list[SideProcess] = []
    with tempfile.TemporaryDirectory(prefix="holdfast-load-") as home:
        async with services(Path(home)) as around:
            store = around.store(kind)
            try:
                sides += [around.side(f"worker-{n}", "agent", store, more) for n in range(PROCESSES)]
                await asyncio.gather(*(asyncio.to_thread(side.answer) for side in sides))
                work = {"do": "run", "agents": AGENTS, "turns": TURNS}
                await asyncio.gather(*(asyncio.to_thread(side.ask, **work) for side in sides))
            finally:
                for side in sides:
                    side.stop()
    model.close()
    return _judge(kind, service)


def _judge(kind: str, service: Service) -> list[str]:
    begun, ended = service.arrivals[0][0], service.arrivals[-1][0]
    period = SPAN * SLOT_S
    # Whole spans of the limiter, after the first one's burst and before the runs begin to end.
    spans = int((ended - begun) // period) - 1
    inside = [at for at, _ in service.arrivals if begun + period - 1 <= at < begun + period - 1 + spans * period]
    used = len(inside) / (spans * period / 60) / PER_MINUTE if spans > 0 else 0.0
    most, _ = service.most_in_a_minute()
    calls = [service.calls[agent] for agent in service.calls]
    claims = {
        f"{most} requests in the fullest sliding minute, {PER_MINUTE} are allowed": most <= PER_MINUTE,
        f"{used:.1%} of the allowed rate used over {spans * period:.0f} s, 95 % are wanted": used >= 0.95,
        f"{service.refused} calls answered 429": service.refused == 0,
        f"{len(calls)} runs came to their end, each of {TURNS} turns": set(calls) == {TURNS}
        and len(calls) == PROCESSES * AGENTS,
    }
    console.print(f"{kind}: {len(service.arrivals)} calls in {ended - begun:.0f} s")
    for words, holds in claims.items():
        console.print(f"  [{'green' if holds else 'red'}]{'✓' if holds else '✗'}[/] {words}", highlight=False)
    return [words for words, holds in claims.items() if not holds]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.load.workers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", choices=["sqlite", "postgres", "both"], default="both")
    chosen = parser.parse_args().store
    wrong = [words for kind in ("sqlite", "postgres") if chosen in (kind, "both") for words in asyncio.run(run(kind))]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
