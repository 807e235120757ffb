"""A weak model, a few runs: each ends in a typed result, with all calls counted. `python -m bench.weak` makes more."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bench.weak.__main__ import PATIENT
from bench.weak.weak import AGENTS, run_all
from holdfast.contracts.data import Json
from holdfast.dev.simulation.weak import KINDS, weak
from holdfast.dev.stack import Stack, without_ours

MESSAGE: Json = {
    "role": "assistant",
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "book", "arguments": '{"day": 2}'}}],
}


@pytest.fixture
async def frail(tmp_path: Path) -> AsyncIterator[Stack]:
    """A stack whose model is weak."""
    stack = Stack(tmp_path, {**without_ours(os.environ), **PATIENT, "HOLDFAST_WEAK_MODEL": "3"}, durable=False)
    try:
        await stack.start()
        yield stack
    finally:
        stack.stop(grace_s=0)


async def test_runs_against_a_weak_model_end_in_a_typed_result_with_all_calls_counted(frail: Stack) -> None:
    report = await run_all(frail, AGENTS, runs=4, at_once=6)
    assert not report.violations
    assert sum(report.outcomes.values()) == 12
    assert report.usage.calls >= 12
    assert len(report.weaknesses) > 3, "it was weak"


def test_a_seed_gives_the_same_model_again_and_shows_all_its_weaknesses() -> None:
    def said(seed: int) -> list[str]:
        return [weak(seed, f"run-{run}", n, MESSAGE, [MESSAGE]).kind for run in range(40) for n in range(20)]

    assert said(1) == said(1) != said(2)
    assert {*said(1)} == {"well", *KINDS}
