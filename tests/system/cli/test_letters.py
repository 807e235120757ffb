"""Dead letters, settling and orphans from the command line, counted in the hospital's own record."""

from __future__ import annotations

import json
import subprocess
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from holdfast.contracts.data import Json
from holdfast.dev.simulation.hospital import HospitalRecord
from holdfast.dev.stack import Stack, temporal_cli
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.stack import Cli, until

INPUT = '{"patient_id": "pat-1"}'


class Desk:
    """The command line, and the hospital that it acts upon."""

    def __init__(self, cli: Cli, stack: Stack) -> None:
        self.cli = cli
        self._stack = stack
        self._record = HospitalRecord(stack.home / "hospital.db")

    def parsed(self, *arguments: str, status: int = 0) -> Any:
        done = self.cli(*arguments, "--json")
        assert done.returncode == status, done.stdout + done.stderr
        return json.loads(done.stdout)

    def refused(self, *arguments: str) -> str:
        """The error line of a command that cannot do what was asked."""
        done = self.cli(*arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr
        return done.stderr

    def fault(self, service: str, **fault: Any) -> None:
        httpx2.put(f"{self._stack.hospital_url}/faults/{service}", json=fault, timeout=PATIENCE_S).raise_for_status()

    def started(self) -> str:
        """A discharge that waits for the approval of its messages."""
        run = self.parsed("run", "discharge", "-i", INPUT, "--id", uuid4().hex[:8])["workflow_id"]
        until(lambda: len(self.messages(run)) == 2)
        return run

    def messages(self, run: str) -> list[str]:
        asked = [each["approval"] for each in self.parsed("approvals", run)]
        return [each["id"] for each in asked if each["kind"] == "tool"]

    def ended(self, run: str) -> Json:
        """The result, once the messages are approved."""
        for approval in self.messages(run):
            assert self.cli("approve", run, approval, "--by", "dr.lee").returncode == 0
        self.cli("follow", run)
        return self.result(run)

    def result(self, run: str) -> Json:
        return self.parsed("result", run)["result"]

    def letter(self, run: str) -> Json:
        """The only open letter of a run."""
        (found,) = [each for each in self.parsed("dlq", "list") if each["workflow_id"] == run]
        return found

    def effects(self, result: Json, service: str) -> list[tuple[str, str]]:
        prefix = result["key_base"] + "/"
        found = self._record.effects(prefix)
        return [(each.kind, each.key.removeprefix(prefix)) for each in found if each.service == service]


@pytest.fixture
def desk(cli: Cli, stack: Stack) -> Desk:
    cli("breakers", "reset", "pharmacy")  # the tests before have failed there often enough to open it
    return Desk(cli, stack)


@pytest.fixture
def without_pharmacy(desk: Desk) -> str:
    """A discharge that ended partial: the pharmacy refused the order. It is well again."""
    desk.fault("pharmacy", mode="fail", times=1)
    run = desk.started()
    assert desk.ended(run)["outcome"] == "partial"
    return run


def test_an_order_left_pending_is_placed_later_and_once(desk: Desk, without_pharmacy: str) -> None:
    run = without_pharmacy
    assert desk.effects(desk.result(run), "pharmacy") == []
    letter = desk.letter(run)
    assert (letter["subject"], letter["role"], letter["state"]) == ("order_medication", "pharmacist", "open")

    shown = desk.cli("dlq", "show", letter["id"]).stdout
    for part in ("pharmacy", "503", letter["key"], "failed attempts (1)", "UNKNOWN", f"dlq replay {letter['id']}"):
        assert part in shown
    assert "--yes" in desk.refused("dlq", "replay", "--tool", "order_medication")

    (replayed, *_) = desk.parsed("dlq", "replay", letter["id"], "--yes", "--by", "ph.kim")
    assert replayed["ok"]
    result = desk.result(run)
    assert (result["outcome"], result["pending"], result["percent"]) == ("completed", [], 100)
    assert desk.effects(result, "pharmacy") == [("order", letter["key"].rpartition("/")[2])]
    assert "ph.kim" in next(step["detail"] for step in result["steps"] if step["name"] == "pharmacy")

    assert "is closed: replayed" in desk.parsed("dlq", "replay", letter["id"], "--yes", status=1)[0]["words"]
    assert desk.effects(result, "pharmacy") == [("order", letter["key"].rpartition("/")[2])]


def test_a_replay_by_filter_while_the_service_is_down_says_so(desk: Desk, without_pharmacy: str) -> None:
    letter = desk.letter(without_pharmacy)
    desk.fault("pharmacy", mode="fail", times=1, status=500)
    ended = desk.parsed("dlq", "replay", "--tool", "order_medication", "--agent", "discharge", "--yes", status=1)
    (words,) = [each["words"] for each in ended if each["id"] == letter["id"]]
    assert "500" in words
    assert "500" in desk.letter(without_pharmacy)["cause"]
    assert desk.result(without_pharmacy)["outcome"] == "partial"
    desk.parsed("dlq", "drop", letter["id"], "--why", "the patient has it at home")


def test_a_dropped_letter_is_not_replayed(desk: Desk, without_pharmacy: str) -> None:
    letter = desk.letter(without_pharmacy)
    assert "--why" in desk.refused("dlq", "drop", letter["id"], "--why", " ")
    assert (
        desk.cli("dlq", "drop", letter["id"], "--why", "the patient has it at home", "--by", "ph.kim").returncode == 0
    )
    (dropped,) = [each for each in desk.parsed("dlq", "list", "--state", "dropped") if each["id"] == letter["id"]]
    assert dropped["note"] == "dropped by ph.kim: the patient has it at home"
    assert "dropped by ph.kim" in desk.parsed("dlq", "replay", letter["id"], "--yes", status=1)[0]["words"]
    assert "cannot be dropped" in desk.refused("dlq", "drop", letter["id"], "--why", "again")
    assert desk.effects(desk.result(without_pharmacy), "pharmacy") == []


def test_a_pharmacist_settles_the_order_after_the_end(desk: Desk, without_pharmacy: str) -> None:
    run = without_pharmacy
    assert "say which" in desk.refused("settle", run, "pharmacy")
    assert "--comment" in desk.refused("settle", run, "pharmacy", "--did-not")
    assert "there is: pharmacy" in desk.refused("settle", run, "insurance", "--happened")
    assert "not valid JSON" in desk.refused("settle", run, "pharmacy", "--happened", "--result", "by phone")
    done = desk.parsed("settle", run, "pharmacy", "--happened", "--result", '{"id": "by phone"}', "--by", "ph.kim")
    assert done["ok"]
    result = desk.result(run)
    assert result["outcome"] == "completed"
    assert desk.effects(result, "pharmacy") == []
    assert [each["state"] for each in desk.parsed("dlq", "list", "--state", "settled") if each["workflow_id"] == run]
    assert "has no call left to settle" in desk.refused("settle", run, "pharmacy", "--happened")


def test_a_pharmacist_settles_the_order_while_the_run_is_open(desk: Desk) -> None:
    desk.fault("pharmacy", mode="fail", times=1)
    run = desk.started()
    assert "open questions: pharmacy" in desk.refused("settle", run, "insurance", "--happened")
    done = desk.parsed("settle", run, "pharmacy", "--happened", "--by", "ph.kim")
    assert done["accepted"]
    result = desk.ended(run)
    assert result["outcome"] == "completed"
    assert desk.effects(result, "pharmacy") == []


def test_a_terminated_run_is_found_and_undone(desk: Desk, stack: Stack) -> None:
    run = desk.started()
    base = desk.parsed("status", run)["status"]["key_base"]
    assert run not in desk.cli("orphans", "--older-than", "0").stdout
    command = [temporal_cli(), "workflow", "terminate", "--workflow-id", run, "--address", stack.temporal_address]
    subprocess.run(command, check=True, capture_output=True)

    assert {"workflow_id": run, "key_base": base, "stuck": False} in desk.parsed(
        "orphans", "--older-than", "0", status=1
    )
    assert "orphans --fix" in desk.refused("settle", run, "pharmacy", "--happened")
    ended = desk.parsed("orphans", "--fix", "--older-than", "0")
    assert [each["ok"] for each in ended] == [True] * len(ended)
    result = desk.result(run)
    assert (result["outcome"], result["key_base"]) == ("cancelled", base)
    kinds = [kind for service in ("pharmacy", "appointments") for kind, _ in desk.effects(result, service)]
    assert kinds == ["order", "cancel-order", "book", "cancel-booking"]
    assert desk.effects(result, "messages") == []
    assert run not in desk.cli("orphans", "--older-than", "0").stdout


def test_a_failed_run_is_replayed_from_its_letter(desk: Desk, stack: Stack) -> None:
    desk.fault("records", mode="fail", status=400, times=40)
    run = desk.parsed("run", "discharge", "-i", INPUT, "--id", uuid4().hex[:8])["workflow_id"]
    assert desk.cli("follow", run).returncode == 1
    httpx2.delete(f"{stack.hospital_url}/faults", timeout=PATIENCE_S).raise_for_status()
    desk.cli("breakers", "reset", "records")
    letter = desk.letter(run)
    assert (letter["kind"], letter["context"]["input"]["patient_id"]) == ("run", "pat-1")
    replaying = desk.cli.start("dlq", "replay", letter["id"], "--yes", "--json")
    again = f"{run}~1"
    until(lambda: len(desk.messages(again)) == 2 if again in desk.cli("list").stdout else False)
    assert "is being replayed as" in desk.parsed("dlq", "replay", letter["id"], "--yes", status=1)[0]["words"]
    assert desk.ended(again)["outcome"] == "completed"
    said, _ = replaying.communicate(timeout=PATIENCE_S)
    assert replaying.returncode == 0, said
    assert desk.parsed("dlq", "show", letter["id"])["state"] == "replayed"


def test_errors_say_what_to_do(desk: Desk) -> None:
    assert "dlq list" in desk.refused("dlq", "show", "call-0000000000")
    assert "dlq list" in desk.refused("dlq", "replay", "call-0000000000", "--yes")
    assert "filter" in desk.refused("dlq", "replay", "--yes")
    assert "call, undo, run" in desk.refused("dlq", "list", "--kind", "letter")
    assert "starter.py list" in desk.refused("settle", "no-such-run", "pharmacy", "--happened")


def test_the_sweep_is_scheduled(desk: Desk) -> None:
    (check,) = [each for each in desk.parsed("doctor") if each["what"] == "orphan sweep"]
    assert check["ok"]
