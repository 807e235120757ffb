"""`up`: one at a time, watched over, gone without a trace at Ctrl-C, and back with the same runs."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import psycopg
import pytest

from holdfast.dev.stack import without_ours
from holdfast.testing.model import FakeModel, call
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.stack import Cli, processes_of, until


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def cli(home: Path) -> Cli:
    """The command line as a person has it: it finds the stack by its state directory alone."""
    return Cli({**without_ours(os.environ), "HOLDFAST_HOME": str(home)})


@contextmanager
def running(cli: Cli, home: Path) -> Iterator[Popen[str]]:
    up = cli.start("up")
    try:
        until(lambda: (home / "stack.json").exists() or up.poll() is not None)
        assert up.poll() is None, up.stdout and up.stdout.read()
        yield up
    finally:
        up.send_signal(signal.SIGINT)
        up.communicate(timeout=PATIENCE_S)
    assert up.returncode == 0
    assert processes_of(home) == []
    assert not (home / "stack.json").exists()


def test_one_at_a_time_watched_over_and_back_with_the_same_run(cli: Cli, home: Path) -> None:
    with running(cli, home) as up:
        second = cli("up")
        assert second.returncode == 2
        assert f"process {up.pid}" in second.stderr
        assert "Traceback" not in second.stderr

        run = json.loads(cli("run", "discharge", "-i", '{"patient_id": "pat-1"}', "--json").stdout)["workflow_id"]
        until(lambda: len(json.loads(cli("approvals", run, "--json").stdout)) == 2)
        (worker,) = (each for each in processes_of(home) if "worker.py" in " ".join(each.cmdline()))
        worker.kill()
        assert up.stdout is not None
        said = ""
        while "was started again" not in said:
            said = up.stdout.readline()
            assert said, "up ended"
        assert "worker 1" in said

    nobody = cli("status", run)
    assert (nobody.returncode, "starter.py up" in nobody.stderr) == (2, True)

    with running(cli, home):
        approved = cli("approve", run, "--by", "dr.lee")
        assert approved.returncode == 0, approved.stderr
        assert cli("follow", run).returncode == 0


@pytest.mark.parametrize("moment", ["temporal-server.log", "worker-1.log"])
def test_ctrl_c_while_starting_leaves_nothing(cli: Cli, home: Path, moment: str) -> None:
    up = cli.start("up")
    until((home / "logs" / moment).exists)
    for _ in range(2):  # a terminal and a wrapper such as `uv run` may both pass it on
        up.send_signal(signal.SIGINT)
    said, _ = up.communicate(timeout=PATIENCE_S)
    assert up.returncode == 0, said
    assert "Traceback" not in said
    assert processes_of(home) == []


def test_nothing_outlives_a_parent_that_is_killed(cli: Cli, home: Path) -> None:
    up = cli.start("up")
    until((home / "stack.json").exists)
    up.kill()
    up.communicate()
    until(lambda: not processes_of(home))


async def test_commands_beside_it_use_what_it_uses(home: Path, cli: Cli, postgres_url: str) -> None:
    """Its model, its store and its task queue, though only its own terminal has them set; and no secret of them."""
    async with FakeModel.serve() as model:
        model.script = lambda messages: call(("report_ready", {"word": "ready"}))
        of_up = {
            "OPENAI_BASE_URL": model.url,
            "OPENAI_API_KEY": "hunter2",
            "HOLDFAST_MODEL": "house-1",
            "HOLDFAST_TASK_QUEUE": "ours",
            "DATABASE_URL": f"{postgres_url}&password=hunter2",
        }
        with running(Cli({**cli.environment, **of_up}), home):
            assert "hunter2" not in (home / "stack.json").read_text()
            done = await asyncio.to_thread(cli, "doctor", "--json")
            checks = {each["what"]: each for each in json.loads(done.stdout)}
            assert checks["store"]["ok"] and checks["store"]["found"].startswith("Postgres")
            assert "house-1 at" in checks["model"]["found"] and model.url in checks["model"]["found"]
            assert checks["tool calls of house-1"]["ok"]
            assert done.returncode == 0

            started = await asyncio.to_thread(cli, "run", "triage", "-i", '{"text": "dizzy"}', "--id", "a", "--json")
            assert started.returncode == 0, started.stderr
            async with await psycopg.AsyncConnection.connect(postgres_url) as connection:
                rows = await (await connection.execute("SELECT workflow_id FROM runs")).fetchall()
            assert rows == [("triage-a",)]
            assert not (home / "holdfast.db").exists()
            cancelled = await asyncio.to_thread(cli, "cancel", "triage-a")
            assert cancelled.returncode == 0, cancelled.stderr
