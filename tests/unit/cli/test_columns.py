"""`list` keeps its columns: nothing is cut, at a terminal of 80 and in a pipe."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.cli.columns import HEADINGS, lines, row
from holdfast.contracts.data import Json

NOW = 1_764_130_000.0


def run(id: str = "discharge-3a6d62d6", **more: Any) -> Json:
    common = {"agent": "discharge", "status": "waiting-human", "stage": "appointments"}
    return {"workflow_id": id, **common, "started_at": NOW - 200_000, "ended_at": None, **more}


def listed(*runs: Json, width: int | None) -> list[str]:
    return [line.plain for line in lines([row(each, NOW, short=width is not None) for each in runs], width)]


def test_at_80_columns_every_column_of_an_ordinary_run_is_on_its_line() -> None:
    said = listed(run(), run(stage="", status="completed", ended_at=NOW), width=80)
    assert all(len(line) <= 80 and "\n" not in line for line in said)
    for word in ("discharge-3a6d62d6", "waiting-human", "appointments", "2d7h"):
        assert word in said[1]


@pytest.mark.parametrize("id", ["x" * 300, "日本" * 40, "contracts-march.lease-0001-of-the-third-quarter"])
def test_an_id_that_is_too_long_has_a_line_of_its_own_and_is_whole(id: str) -> None:
    head, first, second = listed(run(id), run(), width=80)
    assert first.split("\n")[0] == id
    # The columns of all runs are below each other, as the heading is.
    starts = [
        line.split("\n")[1].index(word) for line, word in ((head, "status"), (first, "waiting"), (second, "waiting"))
    ]
    assert len(set(starts)) == 1


def test_in_a_pipe_each_run_is_one_line_with_the_same_columns() -> None:
    said = listed(run("x" * 300), run(stage="", agent="a"), width=None)
    starts = [said[0].index(name) for name in HEADINGS]
    for line in said:
        assert "\n" not in line
        assert all(start == 0 or line[start - 2 : start].isspace() for start in starts)
        assert all(not line[start].isspace() for start in starts), "an empty column is a dash"
    assert "x" * 300 in said[1]


def test_what_an_id_carries_cannot_steer_the_terminal() -> None:
    (_, said) = listed(run("a\x1b[2Jb[bold]"), width=None)
    assert "\x1b" not in said
    assert "[bold]" in said
