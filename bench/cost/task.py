"""The work that both sides do: record a row a turn; a gated run ends with one call that a person has to allow.

Imported by both workers, so it stands on neither side's code.
"""

from __future__ import annotations

import time

from holdfast.contracts.data import Json

INSTRUCTIONS = "You are a careful agent. Record one row a turn with the tool `record`, then say that you are done."
RECORD = "Record one row."
RELEASE = "Release the rows."
TOOLS: list[Json] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {"row": {"type": "string"}}, "required": ["row"]},
        },
    }
    for name, description in (("record", RECORD), ("release", RELEASE))
]

released: dict[str, float] = {}
"""When a gated run's last call ran, by `time.perf_counter()`, by row. Worker and client are one process."""


def prompt(name: str, turns: int, gate: bool) -> str:
    """The first user message; `bench.cost.fake_llm` reads the numbers."""
    return f"Do the work {name} in turns={turns}" + (", with a release" if gate else "")


def final(turns: int) -> str:
    """How a run of so many turns ends."""
    return f"done after {turns} turns"


def record(row: str) -> str:
    return f"recorded {row}"


def release(row: str) -> str:
    released[row] = time.perf_counter()
    return f"released {row}"
