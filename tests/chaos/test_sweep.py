"""A slice of the kill sweep (`uv run poe sweep` tries every point at every step): one case of each kind."""

from __future__ import annotations

import pytest

from bench.sweep.cases import Case, Flow, Mode, cases, unreached
from bench.sweep.environment import Lane, Servers
from bench.sweep.sweep import traces, try_case
from holdfast.reliability.crash_points import Point

pytestmark = pytest.mark.asyncio(loop_scope="session")

KILL, FREEZE, APPROVED, FAILED = Mode.KILL, Mode.FREEZE, Flow.APPROVED, Flow.FAILED
BOOK, PATIENT, PROVIDERS = "book_appointment", "notify_patient", "notify_providers"
SLICE = [
    (Case(KILL, APPROVED, Point.LIMITED, "turn-1"), "postgresql"),
    (Case(KILL, APPROVED, Point.MODEL_ANSWERED, "turn-2"), "sqlite"),
    (Case(KILL, APPROVED, Point.NODE_DONE, "turn-3"), "postgresql"),
    (Case(KILL, APPROVED, Point.RESERVED, BOOK), "sqlite"),
    (Case(KILL, APPROVED, Point.EFFECT_DONE, "order_medication"), "postgresql"),
    (Case(KILL, APPROVED, Point.EFFECT_DONE, PATIENT), "sqlite"),
    (Case(KILL, APPROVED, Point.EFFECT_DONE, PROVIDERS), "postgresql"),
    (Case(KILL, APPROVED, Point.WAITING, "tool"), "sqlite"),
    (Case(KILL, FAILED, Point.UNDO_DONE, PROVIDERS), "postgresql"),
    (Case(KILL, FAILED, Point.LETTERS_WRITTEN, "run"), "sqlite"),
    (Case(KILL, FAILED, Point.END_RECORDED, "run"), "sqlite"),
    (Case(KILL, Flow.SETTLED, Point.RESERVED, PATIENT), "postgresql"),
    (Case(KILL, Flow.SETTLED, Point.FINDING_RECORDED, "outcome"), "sqlite"),
    (Case(KILL, Flow.ASKED, Point.PROBED, PROVIDERS), "postgresql"),
    (Case(KILL, Flow.PUT_OFF, Point.PROBING, "appointments"), "sqlite"),
    (Case(FREEZE, APPROVED, Point.RESERVED, PROVIDERS), "postgresql"),
]


@pytest.mark.parametrize(("case", "store"), SLICE, ids=str)
async def test_the_run_ends_right(servers: Servers, lane: Lane, case: Case, store: str) -> None:
    report = await try_case(servers, lane, store, case)
    assert not report.violations, "\n".join([*report.violations, report.log])


async def test_every_point_is_reached(servers: Servers, lane: Lane) -> None:
    passed = await traces(servers, lane, "sqlite")
    assert unreached(passed) == []
    found = {(case.flow, case.point, case.where) for case in cases(passed, KILL)}
    assert {(case.flow, case.point, case.where) for case, _ in SLICE} <= found
