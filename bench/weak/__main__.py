"""`uv run poe weak`: runs of each shipped agent against a weak model, judged by the model's own record.

Every run has to end in a typed result, with every request counted that the model answered or was cut at. Exit status:
0 when everything held, 1 for a violation.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

from bench.weak.weak import AGENTS, Report, run_all
from holdfast.dev.stack import Stack, without_ours

PATIENT = {"HOLDFAST_MODEL_FIRST_TOKEN_S": "110", "HOLDFAST_MODEL_BETWEEN_TOKENS_S": "110"}
"""The machine may be slow; what is tried here is not how slow."""


async def main(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="holdfast-weak-") as home:
        base = {**without_ours(os.environ), **PATIENT, "HOLDFAST_WEAK_MODEL": str(arguments.seed)}
        stack = Stack(Path(home), base, durable=False)
        began = time.monotonic()
        try:
            await stack.start(workers=arguments.workers)
            report = await run_all(stack, arguments.agents, arguments.runs, arguments.at_once)
        finally:
            stack.stop()
    show(report, arguments.seed, time.monotonic() - began)
    return 1 if report.violations else 0


def show(report: Report, seed: int, seconds: float) -> None:
    print(f"seed {seed}, {sum(report.outcomes.values())} runs in {seconds:.0f} s")
    for name, number in sorted(report.outcomes.items()):
        print(f"  {name}: {number}")
    print("the model: " + ", ".join(f"{kind} {n}" for kind, n in report.weaknesses.most_common()))
    used = report.usage
    print(f"counted: {used.calls} calls, {used.input_tokens:,} tokens read, {used.output_tokens:,} written")
    for each in report.violations:
        print(f"VIOLATION {each}")
    print("everything held" if not report.violations else f"{len(report.violations)} violations")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.weak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=200, help="of each agent")
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--agents", nargs="+", choices=AGENTS, default=AGENTS)
    sys.exit(asyncio.run(main(parser.parse_args())))
