"""The demo holds what it claims, and leaves nothing behind whenever it is stopped."""

import os
import re
import signal
from pathlib import Path

import pytest

from holdfast.stack import without_ours
from tests.fixtures.clock import PATIENCE_S
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
