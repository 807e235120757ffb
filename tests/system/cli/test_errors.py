"""Wrong use, no server, unknown ids: one clear line on stderr, exit status 2, no traceback."""

import os
from pathlib import Path

import pytest

from holdfast.dev.stack import without_ours
from tests.fixtures.stack import Cli

NOWHERE = {"TEMPORAL_ADDRESS": "127.0.0.1:1"}
INPUT = '{"patient_id": "pat-1"}'

WRONG = {
    "no agent": (["run"], "AGENT"),
    "unknown command": (["runn"], "runn"),
    "unknown option": (["list", "--jsn"], "--jsn"),
    "unknown agent": (["run", "nobody"], "there are: contract, discharge"),
    "missing field": (["run", "discharge"], "patient_id: Field required"),
    "wrong type": (["run", "discharge", "-i", '{"patient_id": 7}'], "patient_id: Input should be a valid string"),
    "unknown field": (["run", "discharge", "-i", '{"patient_id": "pat-1", "colour": 1}'], "colour"),
    "bad JSON": (["run", "discharge", "-i", '{"patient_id": '], "not valid JSON"),
    "no object": (["run", "discharge", "-i", "[1]"], "JSON object"),
    "no file": (["run", "discharge", "-i", "nothing.json"], "nothing.json"),
    "bad key": (["run", "discharge", "-i", INPUT, "--id", " a\n"], "request key"),
    "wait and follow": (["run", "discharge", "-i", INPUT, "--wait", "--follow"], "exclude each other"),
    "status of unknown": (["status", "nobody-1"], "no run 'nobody-1'"),
    "follow of unknown": (["follow", "nobody-1"], "starter.py list"),
    "result of unknown": (["result", "nobody-1"], "starter.py list"),
    "approvals of unknown": (["approvals", "nobody-1"], "starter.py list"),
    "approve unknown": (["approve", "nobody-1"], "starter.py list"),
    "cancel unknown": (["cancel", "nobody-1"], "starter.py list"),
    "reject without reason": (["reject", "nobody-1"], "(see `uv run starter.py reject --help`)"),
    "breakers trip without a target": (["breakers", "trip"], "(see `uv run starter.py breakers trip --help`)"),
    "reject with an empty reason": (["reject", "nobody-1", "--reason", " "], "--reason is empty"),
    "reject with the reason of the page": (["reject", "nobody-1", "--reason", "WHY"], "--reason is still 'WHY'"),
    "reject with a reason that nobody sees": (["reject", "nobody-1", "--reason", "\u200b"], "--reason is empty"),
    "approve by nobody": (["approve", "nobody-1", "--by", "\u200b"], "--by is blank"),
    "approve by the name of the page": (["approve", "nobody-1", "--by", "YOUR NAME"], "--by is still 'YOUR NAME'"),
    "message as printed": (["message", "nobody-1", " "], "text is blank"),
    "tools of unknown": (["tools", "nobody"], "there are: contract, discharge"),
}


def is_one_clear_line(code: int, stderr: str, says: str) -> None:
    assert code == 2, stderr
    assert "Traceback" not in stderr
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    assert says in lines[0]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(cli: Cli, name: str) -> None:
    arguments, says = WRONG[name]
    done = cli(*arguments)
    is_one_clear_line(done.returncode, done.stderr, says)
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [["run", "discharge", "-i", INPUT], ["list"], ["status", "r"], ["approve", "r"], ["cancel", "r"], ["result", "r"]],
    ids=lambda arguments: arguments[0],
)
def test_no_server(cli: Cli, arguments: list[str]) -> None:
    done = cli(*arguments, **NOWHERE)
    is_one_clear_line(done.returncode, done.stderr, "starter.py up")
    assert "(Connection refused)" in done.stderr
    assert "tonic" not in done.stderr


def test_where_nothing_runs_doctor_says_so_once(tmp_path: Path) -> None:
    done = Cli({**without_ours(os.environ), "HOLDFAST_HOME": str(tmp_path)})("doctor")
    assert done.returncode == 1
    words = " ".join(done.stdout.split())
    assert "nothing runs here: no Temporal server, large payloads, store, model, hospital (simulated)" in words
    assert words.count("✗") == words.count("starter.py up") == 1


def test_a_request_key_in_place_of_the_run_is_recognized(cli: Cli) -> None:
    key = "a-key-not-an-id"
    start = ("run", "triage", "-i", '{"text": "I feel dizzy since I take the new tablets."}', "--id", key)
    assert cli(*start, "--wait").returncode == 0
    assert "(started before with the same key; it ended completed)" in cli(*start).stderr
    for command in ("status", "cancel", "result"):
        done = cli(command, key)
        is_one_clear_line(done.returncode, done.stderr, f"no run '{key}': did you mean triage-{key}?")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"DATABASE_URL": "sqlite:////nowhere/holdfast.db"}, "starter.py migrate"),
        ({"DATABASE_URL": "mysql://there"}, "postgresql://"),
        ({"HOLDFAST_DRAIN_S": "soon"}, "HOLDFAST_DRAIN_S"),
    ],
    ids=["no store", "unknown kind of store", "bad setting"],
)
def test_settings_that_do_not_fit(cli: Cli, environment: dict[str, str], says: str) -> None:
    done = cli("run", "discharge", "-i", INPUT, **environment)
    is_one_clear_line(done.returncode, done.stderr, says)
