"""The demo holds what it claims, and leaves nothing behind whenever it is stopped."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from holdfast.cli.demo import said
from holdfast.contracts.people import Verdict
from holdfast.dev.stack import ROOT, without_ours
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.stack import Cli, processes_of


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """With settings that would lead the demo astray if it heeded them, and its state where the test can see it."""
    astray = {
        "OPENAI_API_KEY": "sk-not-a-key",
        "OPENAI_BASE_URL": "http://127.0.0.1:1/v1",
        "TEMPORAL_ADDRESS": "127.0.0.1:1",
        "DATABASE_URL": "postgresql://127.0.0.1:1/none",
        "HOLDFAST_HOME": str(tmp_path / "elsewhere"),
    }
    return Cli({**without_ours(os.environ), **astray, "TMPDIR": str(tmp_path)})


@pytest.mark.parametrize(
    ("options", "claims", "outcome"),
    [
        (
            (),
            (
                "left pending for the pharmacist",
                "2 messages were sent, each after",
                "settled the order after the run's end, and the result is completed",
            ),
            "partial",
        ),
        (("--fail",), ("is undone: cancel-booking, cancel-order", "in reverse order", "no message was sent"), "failed"),
    ],
    ids=["demo", "demo --fail"],
)
def test_all_claims_hold(
    cli: Cli, tmp_path: Path, options: tuple[str, ...], claims: tuple[str, ...], outcome: str
) -> None:
    done = cli("demo", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    for claim in (*claims, "no recorded call was repeated", f"ended as it should: {outcome}"):
        assert re.search(f"✓ .*{claim}", done.stdout), done.stdout
    assert done.stdout.count("is killed with SIGKILL") == 2
    assert "temporal workflow signal" in done.stdout
    assert "SIMULATED" in done.stdout
    assert processes_of(tmp_path) == []
    assert list(tmp_path.glob("holdfast-demo-*")) == []


def test_at_a_terminal_each_message_is_asked_for_and_a_word_is_enough(cli: Cli, tmp_path: Path) -> None:
    answers = [
        ("notify_patient: send this?", "perhaps"),
        ("notify_patient: send this?", "Y"),
        ("notify_providers: send this?", "no"),
        ("reason, which the agent reads", " "),
        ("reason, which the agent reads", "wrong recipients"),
    ]
    ours, theirs = os.openpty()
    environment = {**cli.environment, "TERM": "xterm", "COLUMNS": "100"}
    demo = subprocess.Popen(
        [sys.executable, str(ROOT / "starter.py"), "demo"], env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown, seen = "", 0
    with suppress(OSError):  # the terminal's other side is closed: the demo has ended
        while text := os.read(ours, 65536).decode(errors="replace"):
            shown += text
            if answers and (at := shown.find(answers[0][0], seen)) >= 0:
                seen = at + 1
                os.write(ours, f"{answers.pop(0)[1]}\n".encode())
    os.close(ours)
    demo.wait(PATIENCE_S)  # its status is also that of a claim about this machine's speed
    assert answers == [], shown
    for words in (
        "a7: approve recorded",
        "a8: reject recorded",
        "still stands: notify_patient #7",
        "1 message was sent",
    ):
        assert words in shown
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *((word, Verdict.APPROVE) for word in ("y", "Y", "yes", "a", "approve")),
        *((word, Verdict.REJECT) for word in ("n", "NO", "r", "reject")),
        *((word, None) for word in ("", "yess", "maybe", "1")),
    ],
)
def test_what_is_taken_for_a_yes_and_for_a_no(typed: str, meant: Verdict | None) -> None:
    assert said(typed) is meant


@pytest.mark.parametrize("moment", ["starting Temporal", "run  ", "is killed", "asks the physician"])
def test_ctrl_c_leaves_nothing(cli: Cli, tmp_path: Path, moment: str) -> None:
    demo = cli.start("demo")
    assert demo.stdout is not None
    while moment not in (line := demo.stdout.readline()):
        assert line, "the demo ended"
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=PATIENCE_S)
    assert demo.returncode == 130
    assert processes_of(tmp_path) == []
