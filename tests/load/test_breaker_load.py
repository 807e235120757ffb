"""A small slice of `python -m tests.load.breaker`."""

from __future__ import annotations

from pathlib import Path

from tests.load.breaker import Hammering, run


async def test_a_dead_service_is_called_by_one_probe_at_a_time_whoever_dies(store_url: str, tmp_path: Path) -> None:
    hammering = Hammering(processes=5, dead_s=3.5, probe_after_s=1.5, timeout_s=0.5, lease_s=1.2)
    report = await run(hammering, store_url, tmp_path)
    assert report.failures() == []
