"""`new`: what it writes runs at once, in a copy of this checkout that nobody else uses."""

import re
import shutil
import subprocess
import sys

import pytest

from holdfast.cli.new import files
from holdfast.dev.stack import ROOT
from tests.fixtures.checkout import Checkout
from tests.fixtures.stack import until

NEW = "a_new_agent"
"""Not the name in our docs: whoever followed them has that agent, and this suite has to stay green."""


def test_the_new_agent_runs_at_once_and_its_test_is_green(checkout: Checkout, up: subprocess.Popen[str]) -> None:
    made = checkout("starter.py", "new", NEW)
    assert made.returncode == 0, made.stderr
    assert f"uv run starter.py run {NEW} --follow" in made.stdout

    run = checkout.json("run", NEW)["workflow_id"]  # type: ignore[index]  # before `up` can have taken it
    until(lambda: checkout.said(f"{NEW}/script.py, {NEW}/spec.py), taken at "))
    until(lambda: bool(checkout.json("approvals", run)))
    assert checkout("starter.py", "approve", run, "--by", "you").returncode == 0
    done = checkout("starter.py", "follow", run)
    assert (done.returncode, "The people are invited." in done.stdout) == (0, True), done.stdout
    assert len(list((checkout.home / "workspace" / NEW).iterdir())) == 2

    # An edit is taken while everything is up; one that is wrong is not, and the agent goes on as it was.
    spec = checkout.root / "agents" / NEW / "spec.py"
    text = spec.read_text()
    spec.write_text(text.replace("effect=Effect.IDEMPOTENT, ", "", 1))
    until(lambda: checkout.said(f"is not taken: agents/{NEW}/spec.py: TypeError:"))
    broken = checkout("starter.py", "agents")
    assert (broken.returncode, f"agents/{NEW}/spec.py: TypeError:" in broken.stdout) == (0, True)
    spec.write_text(text)

    tested = checkout("-m", "pytest", "-n", "0", f"agents/{NEW}")
    assert (tested.returncode, "2 passed" in tested.stdout) == (0, True), tested.stdout + tested.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Meetings", "cannot be an agent's name"),
        ("class", "cannot be an agent's name"),
        ("discharge", "exists already"),
        ("contract", "named 'contract' exists already"),  # the agent of agents/contracts
    ],
)
def test_a_name_that_does_not_fit_is_refused_and_nothing_is_written(name: str, words: str) -> None:
    before = sorted((ROOT / "agents").iterdir())
    done = subprocess.run([sys.executable, "starter.py", "new", name], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert sorted((ROOT / "agents").iterdir()) == before


def test_half_an_agent_is_not_left_behind(checkout: Checkout) -> None:
    full = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
    start = f"sys.argv = ['starter.py', 'new', '{NEW}']; runpy.run_path('starter.py', run_name='__main__')"
    done = checkout("-B", "-c", full + start)
    assert (done.returncode, "cannot write" in done.stderr, len(done.stderr.splitlines())) == (2, True, 1), done.stderr
    assert not (checkout.root / "agents" / NEW).exists()


def test_a_copied_agent_that_kept_its_name_is_not_silently_one_of_the_two(checkout: Checkout) -> None:
    shutil.copytree(checkout.root / "agents" / "triage", checkout.root / "agents" / "urgent")
    done = checkout("starter.py", "agents")
    says = "agents/urgent/spec.py: the name 'triage' is taken by agents/triage/spec.py"
    assert (done.returncode, says in done.stdout, done.stderr) == (0, True, ""), done.stdout


def test_the_docs_show_what_new_writes() -> None:
    page = (ROOT / "docs/how-to/own-agents.md").read_text()
    shown = re.search(r"<!-- from: agents/meetings/spec.py -->\n```python\n(.*?)```", page, re.S)
    assert shown is not None
    assert shown[1] == files("meetings")["spec.py"]
