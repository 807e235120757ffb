"""Breakers from the command line, against a store alone: no server, no worker."""

from __future__ import annotations

import json
import os

import pytest

from holdfast.dev.stack import without_ours
from tests.fixtures.stack import Cli


@pytest.fixture
def cli(store_url: str) -> Cli:
    return Cli({**without_ours(os.environ), "DATABASE_URL": store_url})


def test_a_trip_is_listed_until_it_is_reset(cli: Cli) -> None:
    assert "all are closed" in cli("breakers").stdout
    tripped = cli("breakers", "trip", "pharmacy", "--why", "moving house", "--by", "lee")
    assert (tripped.returncode, tripped.stderr) == (0, "")
    (row,) = json.loads(cli("breakers", "list", "--json").stdout)
    assert (row["target"], row["state"], row["held"]) == ("pharmacy", "open", True)
    assert "tripped by lee: moving house" in cli("breakers").stdout
    assert cli("breakers", "reset", "pharmacy").returncode == 0
    (row,) = json.loads(cli("breakers", "--json").stdout)
    assert (row["state"], row["held"]) == ("closed", False)


def test_a_target_that_nothing_is_known_of_is_tripped_and_said_to_be_unknown(cli: Cli) -> None:
    assert "no tool uses" not in cli("breakers", "trip", "pharmacy", "--why", "x").stdout
    told = cli("breakers", "trip", "pharmacie", "--why", "x")
    assert told.returncode == 0
    assert "no tool uses 'pharmacie'" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["reset", "pharmacie"], "there are: 'pharmacy'"),
        (["trip", "pharmacy"], "--why"),
        (["trip", "pharmacy", "--why", " "], "--why is empty"),
    ],
    ids=["unknown target", "no reason", "empty reason"],
)
def test_wrong_use_is_one_clear_line(cli: Cli, arguments: list[str], says: str) -> None:
    cli("breakers", "trip", "pharmacy", "--why", "moving house")
    done = cli("breakers", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert says in done.stderr
