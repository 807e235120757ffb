"""Runs from the command line: started once per key, followed, decided, ended with the right status."""

import json
import sys
from subprocess import PIPE, Popen
from typing import Any
from uuid import uuid4

import pytest

from holdfast.dev.stack import ROOT, Stack
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.stack import Cli, until

INPUT = '{"patient_id": "pat-1"}'


@pytest.fixture
def key() -> str:
    return uuid4().hex[:8]


def parsed(cli: Cli, *arguments: str, **environment: str) -> Any:
    done = cli(*arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def start_and_wait_for_the_question(cli: Cli, key: str) -> str:
    run = parsed(cli, "run", "discharge", "-i", INPUT, "--id", key)["workflow_id"]
    until(lambda: len(parsed(cli, "approvals", run)) == 2)
    return run


def test_ten_starters_at_once_make_one_run(stack: Stack, cli: Cli, key: str) -> None:
    command = [sys.executable, str(ROOT / "starter.py"), "run", "discharge", "-i", INPUT, "--id", key, "--json"]
    starters = [Popen(command, env=stack.environment, stdout=PIPE, text=True) for _ in range(10)]
    told = [json.loads(starter.communicate()[0]) for starter in starters]
    assert [starter.returncode for starter in starters] == [0] * 10
    assert {each["workflow_id"] for each in told} == {f"discharge-{key}"}
    listed = parsed(cli, "list", "-n", "100")
    assert [each["workflow_id"] for each in listed].count(f"discharge-{key}") == 1


def test_following_without_a_terminal_says_once_how_to_answer_each_request(cli: Cli, key: str) -> None:
    run = start_and_wait_for_the_question(cli, key)
    following = cli.start("follow", run)
    assert following.stdout is not None
    said = ""
    while said.count(f"; to read and answer it: uv run starter.py approvals {run}\n") < 2:
        line = following.stdout.readline()
        assert line, said
        said += line
    assert cli("approve", run, "--by", "dr.lee").returncode == 0
    said += following.communicate(timeout=PATIENCE_S)[0]
    assert following.returncode == 0
    assert said.count("asks: notify_patient") == said.count("asks: notify_providers") == 1


def test_life_of_a_run(cli: Cli, key: str) -> None:
    run = start_and_wait_for_the_question(cli, key)

    status = parsed(cli, "status", run)
    assert status["source"] == "workflow"
    assert status["status"]["phase"] == "waiting-human"
    first, second = (each["approval"]["id"] for each in parsed(cli, "approvals", run))
    assert "(simulated)" in cli("status", run).stdout

    wrong = cli("approve", run, "a99")
    assert (wrong.returncode, "a99" in wrong.stderr) == (2, True)
    assert parsed(cli, "approve", run, first, "--by", "dr.lee")[0]["accepted"]
    again = cli("approve", run, first)
    assert (again.returncode, "already" in again.stderr) == (2, True)
    assert parsed(cli, "approve", run, "--by", "dr.lee")[0]["approval_id"] == second

    ended = cli("follow", run)
    assert ended.returncode == 0, ended.stderr
    result = parsed(cli, "result", run)["result"]
    assert result["outcome"] == "completed"
    assert [each["decision"]["approver"] for each in result["decisions"]] == ["dr.lee", "dr.lee"]

    for late in (["approve", run], ["approve", run, first], ["cancel", run], ["reject", run, "--reason", "too late"]):
        done = cli(*late)
        assert done.returncode == 2
        assert "has ended (completed)" in done.stderr

    same = parsed(cli, "run", "discharge", "-i", INPUT, "--id", key)
    assert (same["workflow_id"], same["new"]) == (run, False)
    other = cli("run", "discharge", "-i", '{"patient_id": "pat-2"}', "--id", key)
    assert other.returncode == 2
    assert run in other.stderr


@pytest.mark.parametrize(
    ("answer", "outcome", "code"),
    [
        (["approve"], "completed", 0),
        (["reject", "--reason", "the patient stays"], "rejected", 4),
        (["cancel"], "cancelled", 5),
    ],
    ids=["approve", "reject", "cancel"],
)
def test_exit_status_of_wait_is_the_outcomes(cli: Cli, key: str, answer: list[str], outcome: str, code: int) -> None:
    run = start_and_wait_for_the_question(cli, key)
    waiting = cli.start("run", "discharge", "-i", INPUT, "--id", key, "--wait")
    command, *options = answer
    assert cli(command, run, *options).returncode == 0
    said, _ = waiting.communicate(timeout=PATIENCE_S)
    assert waiting.returncode == code, said
    assert said.startswith(run)
    assert parsed(cli, "result", run)["result"]["outcome"] == outcome


def test_without_a_worker(cli: Cli, key: str) -> None:
    """Nothing hangs: status says that nobody answers, and a decision is kept as a Signal."""
    queue = {"HOLDFAST_TASK_QUEUE": f"nobody-{key}"}
    run = parsed(cli, "run", "discharge", "-i", INPUT, "--id", key, **queue)["workflow_id"]
    status = parsed(cli, "status", run)
    assert (status["source"], status["temporal"]) == ("server", "running")
    assert "worker" in status["note"]
    assert parsed(cli, "approve", run, "a7")[0]["sent_as"] == "signal"
    unnamed = cli("approve", run)
    assert (unnamed.returncode, "id" in unnamed.stderr) == (2, True)
    assert cli("cancel", run).returncode == 0


def test_input_from_a_file_and_from_stdin(cli: Cli, key: str, tmp_path: Any) -> None:
    file = tmp_path / "input.json"
    file.write_text(INPUT)
    first = parsed(cli, "run", "discharge", "-i", str(file), "--id", key)
    second = cli("run", "discharge", "-i", "-", "--id", key, "--json", stdin=INPUT)
    assert json.loads(second.stdout)["workflow_id"] == first["workflow_id"]


def test_catalogue_is_machine_readable(cli: Cli) -> None:
    assert {"discharge", "triage"} <= {agent["name"] for agent in parsed(cli, "agents")}
    tools = {tool["name"]: tool for tool in parsed(cli, "tools", "discharge")}
    assert tools["order_medication"]["arguments"]["required"] == ["patient_id", "items"]
    assert tools["order_medication"]["undo"]
    assert parsed(cli, "migrate")["before"] == parsed(cli, "migrate")["after"]


def test_doctor_finds_and_mends(stack: Stack, cli: Cli, key: str) -> None:
    import subprocess

    from holdfast.dev.stack import temporal_cli

    assert cli("doctor").returncode == 0
    create = ["operator", "namespace", "create", "--namespace", key, "--address", stack.temporal_address]
    subprocess.run([temporal_cli(), *create], check=True, capture_output=True)
    bare = {"TEMPORAL_NAMESPACE": key}

    def mended() -> bool:
        return cli("doctor", "--fix", **bare).returncode == 0

    # The server learns of a new namespace with a delay of up to some seconds.
    until(lambda: "search attributes  " in cli("doctor", **bare).stdout)
    sick = cli("doctor", **bare)
    assert sick.returncode == 1
    assert "HoldfastAgent" in sick.stdout
    assert "doctor --fix" in sick.stdout
    worker = Popen([sys.executable, str(ROOT / "worker.py")], env={**stack.environment, **bare}, stderr=PIPE, text=True)
    _, said = worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == 2
    assert "doctor --fix" in said
    until(mended)
