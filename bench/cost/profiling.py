"""Where a process spends its CPU: py-spy's samples, each counted for the innermost part that we know by name."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT

PARTS = {
    "checkpointer": ("holdfast/state/checkpoints", "langgraph/checkpoint"),
    "ledger": ("holdfast/reliability",),
    "store": ("holdfast/state", "psycopg", "sqlite3"),
    "langgraph": ("langgraph", "langchain"),
    "workflow sandbox": ("workflow_sandbox",),
    "workflow tasks": ("workflows/", "bench/cost/bare.py", "temporalio/worker/_workflow", "temporalio/bridge/worker"),
    "activity tasks": ("temporalio/worker/_activity", "activities/"),
    "payloads": ("temporalio/converter", "temporalio/contrib/pydantic", "holdfast/engine/client.py"),
    "temporal, other": ("temporalio/",),
    "http": ("httpx2", "httpcore2", "h11", "anyio"),
    "openai": ("openai/",),
    "model client": ("holdfast/reasoning/model_client.py", "genai_prices"),
    "pydantic": ("pydantic",),
    "our other code": ("holdfast/", "bench/"),
    "event loop": ("asyncio/", "uvloop", "bench.cost.side"),
}


@contextmanager
def profiled(pid: int, file: Path) -> Iterator[dict[str, float]]:
    """Samples what holds the interpreter during the block; stacks go to `file`.

    The dict is filled on leaving: shares by part, the largest first. Raises FileNotFoundError without py-spy.
    """
    command = ["py-spy", "record", "--pid", str(pid), "--gil", "--format", "raw", "--rate", "200"]
    command += ["--full-filenames", "--output", str(file), "--duration", "3600"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shares: dict[str, float] = {}
    try:
        yield shares
    finally:
        process.send_signal(SIGINT)
        process.wait(60)
    samples = Counter[str]()
    for line in file.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        samples[_part(stack.split(";"))] += int(count)
    shares.update({part: count / samples.total() for part, count in samples.most_common()})


def _part(stack: list[str]) -> str:
    for frame in reversed(stack):
        for part, paths in PARTS.items():
            if any(path in frame for path in paths):
                return part
    return "other"
