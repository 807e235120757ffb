"""Batches on the command line, against a whole stack."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from holdfast.dev.stack import ROOT, Stack
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.stack import Cli

LICENCE = "The {name} License\n\nCopyright 2020 {name}\n\nPermission is hereby granted to use and copy {name}.\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for name in ("Alpha", "Beta", "Gamma"):
        (tmp_path / "texts" / f"{name}.txt").write_text(LICENCE.format(name=name))
    return tmp_path / "texts"


def test_a_folder_is_run_as_one_batch_that_all_commands_know(stack: Stack, cli: Cli, folder: Path) -> None:
    (folder / "empty.txt").touch()
    key = uuid4().hex[:8]
    ran = cli("run", "contracts", "--input", str(folder), "--id", key, "--follow")
    batch = f"contracts-{key}"
    assert ran.returncode == 3
    assert ran.stdout.splitlines()[0] == batch
    assert "1 of 4 documents failed" in ran.stdout
    assert "empty.txt (read: the file is empty)" in ran.stdout
    index = stack.home / "workspace" / batch / "index.md"
    assert f"Index: {index}" in ran.stdout
    assert "3 extracted by scripted-1 (simulated)" in index.read_text()

    again = cli("run", "contracts", "--input", str(folder), "--id", key)
    assert (again.returncode, again.stdout) == (0, f"{batch}\n")
    listed = [each["workflow_id"] for each in json.loads(cli("list", "-n", "500", "--json").stdout)]
    assert batch in listed
    assert not [each for each in listed if each.startswith(f"{batch}.")]
    documents = json.loads(cli("list", "--batch", batch, "--json").stdout)
    assert sorted(each["status"] for each in documents) == ["completed", "completed", "completed", "failed"]
    assert {each["agent"] for each in documents} == {"contract"}
    result = json.loads(cli("result", batch, "--json").stdout)["result"]
    assert result["items"] == {"total": 4, "done": 3, "failed": 1, "open": 0, "parked": 0}
    told = json.loads(cli("status", batch, "--json").stdout)["status"]
    assert (told["percent"], told["outcome"]) == (100, "partial")

    (folder / "empty.txt").write_text(LICENCE.format(name="Delta"))
    letters = json.loads(cli("dlq", "list", "--agent", "contract", "--json").stdout)
    (letter,) = (each["id"] for each in letters if each["workflow_id"].startswith(f"{batch}."))
    assert cli("dlq", "replay", letter, "--yes").returncode == 0
    assert len(list((index.parent / "documents").glob("empty.txt-*.json"))) == 1


def test_a_folder_that_is_none_is_one_line(cli: Cli) -> None:
    failed = cli("run", "contracts", "--input", "nowhere/texts")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: --input is neither a JSON object nor a readable file or folder")


def test_a_batch_is_cancelled_like_a_run(stack: Stack, cli: Cli, folder: Path) -> None:
    key = uuid4().hex[:8]
    nobody = {"HOLDFAST_TASK_QUEUE": uuid4().hex}
    assert cli("run", "contracts", "--input", str(folder), "--id", key, **nobody).returncode == 0
    assert cli("cancel", f"contracts-{key}").returncode == 0
    with working(stack, "main", **nobody) as main:
        followed = cli("follow", f"contracts-{key}", **nobody)
        assert followed.returncode == 5
        stop(main)


def test_the_catalogue_names_batches_and_stages(cli: Cli) -> None:
    said = cli("agents").stdout
    assert "batch of contract" in said
    assert "stage extract" in cli("tools", "contract").stdout
    found = {each["name"]: each for each in json.loads(cli("agents", "--json").stdout)}
    assert found["contracts"]["batch_of"] == "contract"


def working(stack: Stack, *queue: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "worker.py"), *(("--queue", *queue) if queue else ())],
        env={**stack.environment, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(worker: subprocess.Popen[str]) -> str:
    worker.send_signal(signal.SIGTERM)
    said, _ = worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == 0
    return said


def test_workers_of_each_stage_do_together_what_none_does_alone(stack: Stack, cli: Cli, folder: Path) -> None:
    base = uuid4().hex
    queue = {"HOLDFAST_TASK_QUEUE": base}
    crew = [working(stack, stage, **queue) for stage in ("main", "read", "extract", "summarise")]
    try:
        ran = cli("run", "contracts", "--input", str(folder), "--wait", "--json", **queue)
        assert json.loads(ran.stdout)["result"]["outcome"] == "completed"
        said = [stop(worker) for worker in crew]
    finally:
        for worker in crew:
            worker.kill()
            worker.communicate()
    for stage, words in zip(("", ".read", ".extract", ".summarise"), said, strict=True):
        assert words.startswith(f"worker ready: queue {base}{stage} at ")


def test_an_unknown_stage_is_one_line_that_names_those_there_are(stack: Stack) -> None:
    with working(stack, "extrakt") as worker:
        said, wrong = worker.communicate(timeout=PATIENCE_S)
    assert (worker.returncode, said) == (2, "")
    assert wrong.splitlines() == [
        "worker cannot start: --queue extrakt: there is no such stage; the agents' tools name:"
        " main, extract, read, summarise; did you mean extract?"
    ]


def test_nothing_waits_in_a_batch_that_asks_nobody(stack: Stack, cli: Cli, folder: Path) -> None:
    key = uuid4().hex[:8]
    assert cli("run", "contracts", "--input", str(folder), "--id", key, HOLDFAST_TASK_QUEUE=key).returncode == 0
    asked = cli("approvals", f"contracts-{key}", "--json")
    assert (asked.returncode, json.loads(asked.stdout)) == (0, [])
    cli("cancel", f"contracts-{key}")


def test_a_batch_under_a_key_that_is_no_ascii(stack: Stack, cli: Cli, folder: Path) -> None:
    key = f"märz-{uuid4().hex[:8]}"
    ran = cli("run", "contracts", "--input", str(folder), "--id", key, "--follow")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[0] == f"contracts-{key}"
