"""The benchmark runs through and fills its tables. How fast anything is, is not asserted."""

import math

from bench.cost.__main__ import ALL_ON, BARE, Plan, measure, report, summary, targets

TINY = Plan(rounds=1, loads=1, agents=3, turns=3, signals=1, long=(2, 5))


async def test_a_tiny_run_fills_every_figure() -> None:
    found = await measure(TINY, ["sqlite"])

    assert list(found) == [BARE, "sqlite", "sqlite" + ALL_ON]
    for one in found.values():
        assert all(math.isfinite(value) and value >= 0 for value in summary(TINY, one).values())
        assert len(one.long["by_turn"]) == TINY.long[-1]
    goals = targets(TINY, found[BARE], found["sqlite"])
    assert all(goal.measured > 0 for goal in goals)
    text = report(TINY, found)
    assert all(goal.what in text for goal in goals)
