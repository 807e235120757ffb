"""A mistake under `agents/` while `up` runs: said in a line, and everything else goes on."""

import subprocess
from pathlib import Path

import psutil
import pytest

from holdfast.cli import watch
from tests.fixtures.checkout import Checkout
from tests.fixtures.stack import processes_of, until

pytestmark = pytest.mark.timeout(300)
TRIAGE = '{"text": "I feel dizzy since I take the new tablets."}'
BROKEN_AFTER_THE_CHECK = """
from pathlib import Path
Path(__file__).write_text("SPEC = nothing")
"""


def test_prompts_and_tables_count_as_the_agent_and_what_editors_leave_does_not(tmp_path: Path) -> None:
    agent = tmp_path / "agents" / "expenses"
    (agent / "__pycache__").mkdir(parents=True)
    others = (".spec.py.swp", "spec.py~", "test_expenses.py", "__pycache__/spec.pyc")
    for name in ("spec.py", "prompt.md", *others):
        (agent / name).touch()
    assert {path.name for path in watch.agents_now(tmp_path / "agents")} == {"spec.py", "prompt.md"}


def worker(checkout: Checkout) -> list[psutil.Process]:
    return [each for each in processes_of(checkout.home) if "worker.py" in " ".join(each.cmdline())]


def test_a_broken_spec_never_takes_the_stack_down(checkout: Checkout, up: subprocess.Popen[str]) -> None:
    spec = checkout.root / "agents" / "triage" / "spec.py"
    good = spec.read_text()

    spec.write_text("SPEC = nobody")
    until(lambda: checkout.said("is not taken: agents/triage/spec.py: NameError: name 'nobody' is not defined"))
    (killed,) = worker(checkout)
    killed.kill()
    without = "worker 1 works without a broken agent: agents/triage/spec.py: NameError: name"
    until(lambda: checkout.said(f"{without} 'nobody' is not defined (spec.py, line 1)"))
    assert checkout.json("list") == []

    # The check passes, and what the worker then imports is broken.
    spec.write_text(good + BROKEN_AFTER_THE_CHECK)
    until(lambda: checkout.said(f"{without} 'nothing'"))
    assert not checkout.said("taken at ")

    spec.write_text(good)
    until(lambda: checkout.said("agents/ has changed (triage/spec.py), taken at "))
    assert len(worker(checkout)) == 1
    assert checkout("starter.py", "run", "triage", "-i", TRIAGE, "--wait").returncode == 0
    assert up.poll() is None


def test_a_broken_graph_is_not_taken_and_the_other_agents_are_served(
    checkout: Checkout, up: subprocess.Popen[str]
) -> None:
    """Specs only name their graphs: nothing but a worker imports them."""
    graph = checkout.root / "agents" / "triage" / "graph.py"
    good = graph.read_text()

    graph.write_text(good.replace("GRAPH = build()", "MIND = build()"))
    missing = "agents/triage/graph.py: AttributeError: module 'agents.triage.graph' has no attribute 'GRAPH'"
    until(lambda: checkout.said(f"is not taken: {missing}"))
    (killed,) = worker(checkout)
    killed.kill()
    until(lambda: checkout.said(f"worker 1 works without a broken agent: {missing}"))

    graph.write_text(good)
    until(lambda: checkout.said("agents/ has changed (triage/graph.py), taken at "))
    assert checkout("starter.py", "run", "triage", "-i", TRIAGE, "--wait").returncode == 0
    assert up.poll() is None


def test_a_bug_in_a_script_fails_its_run_with_its_line_and_no_other_run(
    checkout: Checkout, up: subprocess.Popen[str]
) -> None:
    assert checkout("starter.py", "new", "expenses").returncode == 0
    script = checkout.root / "agents" / "expenses" / "script.py"
    script.write_text(script.read_text().replace('talk.data["topic"]', 'talk.data["whom"]'))
    until(lambda: checkout.said("expenses/spec.py), taken at "))

    done = checkout("starter.py", "run", "expenses", "--follow")
    assert done.returncode == 1
    line = script.read_text().split('"whom"')[0].count("\n") + 1
    words = f"the script of agents/expenses/script.py failed: KeyError: 'whom' (line {line})"
    assert words in done.stdout, done.stdout
    assert f"{words}\nTraceback" in (checkout.home / "logs" / "model.log").read_text()
    assert checkout.json("breakers") == []
    assert checkout("starter.py", "run", "triage", "-i", TRIAGE, "--wait").returncode == 0
