"""One broken agent stops neither the others nor the commands: it is listed as broken, with its place, and waits."""

import signal
import subprocess
import sys

import pytest

from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.checkout import Checkout
from tests.fixtures.stack import until

pytestmark = pytest.mark.timeout(300)
TRIAGE = '{"text": "I feel dizzy since I take the new tablets."}'

BROKEN = {
    "syntax": ("SPEC = (", "agents/broken/spec.py: SyntaxError: '(' was never closed (spec.py, line 1)"),
    "import": (
        "import nowhere",
        "agents/broken/spec.py: ModuleNotFoundError: No module named 'nowhere' (spec.py, line 1)",
    ),
    "no spec": ("SPECK = 1", "agents/broken/spec.py: TypeError: it has no SPEC = AgentSpec(…)"),
    "leaves": ("import sys\nsys.exit('no licence')", "agents/broken/spec.py: SystemExit: no licence (spec.py, line 2)"),
    "taken name": ("from agents.triage.spec import SPEC", "agents/triage/spec.py: the name 'triage' is taken by"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_commands_say_so_and_go_on(checkout: Checkout, how: str) -> None:
    text, says = BROKEN[how]
    folder = checkout.root / "agents" / "broken"
    folder.mkdir()
    (folder / "spec.py").write_text(text)
    for command in ("agents", "tools"):
        listed = checkout("starter.py", command)
        assert listed.returncode == 0, listed.stderr
        said = " ".join(listed.stdout.split())
        assert "discharge" in said and says.rpartition(": ")[2] in said
    refused = checkout("starter.py", "tools", "broken")
    if how == "taken name":
        return
    assert refused.returncode == 2
    assert says in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert {"name": "broken", "broken": says} in checkout.json("agents")  # pyright: ignore[reportOperatorIssue]


def test_a_run_of_a_broken_agent_waits_while_the_others_work(checkout: Checkout, up: subprocess.Popen[str]) -> None:
    """A worker that starts while one agent is broken serves the others."""
    spec = checkout.root / "agents" / "triage" / "spec.py"
    good = spec.read_text()
    spec.write_text("SPEC = nothing")
    until(lambda: checkout.said("is not taken: agents/triage/spec.py: NameError"))
    environment = {**checkout.environment, "HOLDFAST_TASK_QUEUE": "apart"}
    worker = subprocess.Popen(
        [sys.executable, "worker.py"],
        cwd=checkout.root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline().startswith("not served: agents/triage/spec.py: NameError")
    assert "worker ready" in worker.stdout.readline()
    refused = checkout("starter.py", "run", "triage", "-i", TRIAGE)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "agents/triage/spec.py: NameError" in refused.stderr
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE_S) == 0
    spec.write_text(good)
    until(lambda: checkout.said("taken at "))
    assert checkout("starter.py", "run", "triage", "-i", TRIAGE, "--wait").returncode == 0
