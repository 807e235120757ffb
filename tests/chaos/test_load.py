"""A small slice of `python -m bench.load`."""

from __future__ import annotations

from bench.load.load import Load, run


async def test_agents_of_several_processes_use_a_burst_to_the_last_call_and_no_further(store_url: str) -> None:
    load = Load("slice", (10, 100), (0.5, 1.0), requests=90, tokens=9000, processes=3, agents=8, seconds=3)
    report = await run(load, store_url)
    assert (report.calls, report.most[0], report.refused) == (90, 90, 0)
