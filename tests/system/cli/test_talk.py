"""Talking to a run from the command line: `message` and `edit`, and what they refuse at the door."""

import json
from uuid import uuid4

import pytest

from holdfast.dev.simulation.hospital import HospitalRecord
from holdfast.dev.stack import Stack
from tests.fixtures.stack import Cli
from tests.system.cli.test_runs import parsed, start_and_wait_for_the_question


@pytest.fixture
def run(cli: Cli) -> str:
    return start_and_wait_for_the_question(cli, uuid4().hex[:8])


def test_a_message_and_an_edit_reach_the_run(stack: Stack, cli: Cli, run: str) -> None:
    approvals = {each["approval"]["subject"]: each["approval"]["id"] for each in parsed(cli, "approvals", run)}
    patient = approvals["notify_patient"]
    ambiguous = cli("edit", run, "--set", "text=x")
    assert (ambiguous.returncode, "which call is to be edited" in ambiguous.stderr) == (2, True)
    wrong = cli("edit", run, patient, "--set", "channel=pigeon")
    assert (wrong.returncode, "channel: Input should be 'phone'" in wrong.stderr) == (2, True)
    assert cli("edit", run, patient, "--set", "text=Come back on Monday.", "--by", "dr.lee").returncode == 0
    said = parsed(cli, "message", run, "the daughter drives him home", "--by", "nurse.kim")
    assert said["accepted"]
    assert parsed(cli, "approve", run, "--by", "dr.lee")[0]["approval_id"] == approvals["notify_providers"]
    done = cli("follow", run, "--json")
    result = json.loads(done.stdout.splitlines()[-1])["result"]
    assert result["outcome"] == "completed"
    assert "Heard from nurse.kim: the daughter drives him home" in result["summary"]
    record = HospitalRecord(stack.home / "hospital.db")
    sent = [e for e in record.effects(f"{result['key_base']}/") if e.kind == "message"]
    assert "Come back on Monday." in [e.detail.get("text") for e in sent]


def test_what_cannot_be_said_is_refused_in_a_line(cli: Cli, run: str) -> None:
    for arguments, words in [
        (("message", run, ""), "text: String should have at least 1 character"),
        (("edit", run, "a1"), "say what to change"),
        (("edit", run, "a1", "--set", "text"), "--set takes NAME=VALUE"),
        (("answer", run, "q1", "", "--by", "x"), "the answer is empty"),
        (("answer", run, "q1", "yes", "--by", "x"), "no approval 'q1' is open"),
        (("message", "discharge-none", "x"), "no run 'discharge-none'"),
    ]:
        done = cli(*arguments)
        assert done.returncode == 2, arguments
        assert words in done.stderr, (arguments, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1
    cli("cancel", run)
