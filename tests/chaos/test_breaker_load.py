"""A small slice of `python -m bench.load.breaker`: nobody calls too early. How late, only a quiet machine tells."""

from __future__ import annotations

from pathlib import Path

from bench.load.breaker import Hammering, run
from holdfast.testing.patience import PATIENCE_S


async def test_a_dead_service_is_called_by_one_probe_at_a_time_whoever_dies(store_url: str, tmp_path: Path) -> None:
    times = {"dead_s": 10, "probe_after_s": 4, "timeout_s": 2, "lease_s": 6, "slack_s": 1.5, "late_s": PATIENCE_S}
    hammering = Hammering(processes=5, **times)
    report = await run(hammering, store_url, tmp_path)
    assert report.failures() == []
