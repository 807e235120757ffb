"""A slice of the chaos program (`uv run poe chaos`): a few runs on each store, with a seed that never changes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from bench.chaos.chaos import chaos
from bench.chaos.environment import Postgres

RUNS, AT_A_TIME = 12, 9
SEED = 20261126


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
async def test_nothing_is_doubled_lost_left_standing_or_stuck(store: str, tmp_path: Path) -> None:
    with Postgres.open() if store == "postgresql" else nullcontext() as postgres:
        report = await chaos(tmp_path, postgres, SEED, RUNS, AT_A_TIME, lambda *_: None)
    assert not report.violations, "\n".join([*map(str, report.violations), *report.log])
    assert report.runs == RUNS
    assert report.disturbances, "nothing was disturbed, so nothing was shown"
