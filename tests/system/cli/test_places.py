"""Agents of other folders and installed packages stand beside ours, and a mistake in one stops none of the others."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.dev.stack import ROOT, without_ours

SPEC = """
from pydantic import BaseModel

from holdfast import AgentSpec


class Nothing(BaseModel):
    pass


SPEC = AgentSpec("NAME", "Does nothing.", "Do nothing.", Nothing, ())
"""


def put(folder: Path, agent: str, text: str = SPEC) -> Path:
    (folder / agent).mkdir(parents=True)
    (folder / agent / "spec.py").write_text(text.replace("NAME", agent))
    return folder


def command(*words: str, program: str = "starter.py", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / program), *words],
        env={**without_ours(os.environ), **environment},
        capture_output=True,
        text=True,
    )


def agents(**environment: str) -> dict[str, dict[str, str]]:
    done = command("agents", "--json", **environment)
    assert done.returncode == 0, done.stderr
    return {each["name"]: each for each in json.loads(done.stdout)}


def test_folders_that_are_named_are_taken_beside_ours(tmp_path: Path) -> None:
    one, two = put(tmp_path / "one", "invoices"), put(tmp_path / "two", "letters")
    # Files of an agent find each other by the package `agents`, as in ours, and as neighbours.
    put(two, "rooms", f"from agents.letters.spec import SPEC as OTHER\nfrom ..letters.spec import Nothing\n{SPEC}")
    found = agents(HOLDFAST_AGENTS=f"{one}{os.pathsep}{two}")
    assert {name: each["from"] for name, each in found.items() if each.get("from")} == {
        "invoices": str(one),
        "letters": str(two),
        "rooms": str(two),
    }
    assert "discharge" in found
    assert f"from   {one}" in command("agents", HOLDFAST_AGENTS=str(one)).stdout


def test_an_installed_package_says_that_it_has_agents(tmp_path: Path) -> None:
    put(tmp_path / "ward_agents", "invoices", f"from ward_agents.shared import X\n{SPEC}")
    (tmp_path / "ward_agents" / "shared.py").write_text("X = 1")
    metadata = tmp_path / "ward_agents-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ward-agents\nVersion: 1\n")
    points = "[holdfast.agents]\nward = ward_agents\nlost = no_such_package\n"
    (metadata / "entry_points.txt").write_text(points)
    found = agents(PYTHONPATH=str(tmp_path))
    assert found["invoices"]["from"] == str(tmp_path / "ward_agents")
    assert "entry point lost = 'no_such_package' in holdfast.agents names no package" in found["lost"]["broken"]
    assert "discharge" in found


def test_a_broken_one_is_said_with_file_and_line_and_the_others_are_there(tmp_path: Path) -> None:
    put(put(tmp_path, "invoices"), "letters", "\nimport nowhere")
    found = agents(HOLDFAST_AGENTS=str(tmp_path))
    said = f"{tmp_path}/letters/spec.py: ModuleNotFoundError: No module named 'nowhere' (spec.py, line 2)"
    assert found["letters"]["broken"] == said
    assert {"invoices", "discharge"} <= {*found}


def test_two_of_one_name_are_said_with_both_places(tmp_path: Path) -> None:
    one, two = put(tmp_path / "one", "invoices"), put(tmp_path / "two", "invoices")
    put(two, "urgent", SPEC.replace("NAME", "triage"))
    found = agents(HOLDFAST_AGENTS=f"{one}{os.pathsep}{two}")
    first, second = one / "invoices" / "spec.py", two / "invoices" / "spec.py"
    (broken,) = [each["broken"] for each in found.values() if "folder name" in each.get("broken", "")]
    assert broken == f"{second}: the folder name 'invoices' is taken by {first}: give it one of its own"
    taken = f"{two}/urgent/spec.py: the name 'triage' is taken by agents/triage/spec.py: give it one of its own"
    assert found["urgent"]["broken"] == taken


@pytest.mark.parametrize(
    ("folder", "says"),
    [("nowhere", "and there is no such folder: correct it"), ("invoices", "which is an agent itself: name the folder")],
)
def test_a_folder_that_cannot_be_one_is_said_at_the_door(tmp_path: Path, folder: str, says: str) -> None:
    put(tmp_path, "invoices")
    environment = {"HOLDFAST_AGENTS": str(tmp_path / folder), "HOLDFAST_HOME": str(tmp_path / "home")}
    for program, words in (("worker.py", ()), ("starter.py", ("up",))):
        done = command(*words, program=program, **environment)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert f"HOLDFAST_AGENTS names {tmp_path / folder}, {says}" in done.stderr
    assert says in agents(**environment)[str(tmp_path / folder)]["broken"]
    checks = json.loads(command("doctor", "--json", **environment).stdout)
    (check,) = [each for each in checks if each["what"] == "agents"]
    assert (check["ok"], check["needed"]) == (False, True)
    assert says in check["found"]


def test_a_package_that_has_the_name_of_ours_is_said_in_a_line(tmp_path: Path) -> None:
    """The SDK of OpenAI's agents, for one, is imported as `agents`."""
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("Runner = 1")
    code = "import sys; sys.path.insert(0, 'there'); import holdfast.application as a; {}; a.claim(); import agents"
    done = subprocess.run(
        [sys.executable, "-c", code.format("import agents").replace("there", str(tmp_path))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert re.search(r"NameTaken: the package agents of .*agents/__init__.py has the name of one of", done.stderr)
    late = code.format("pass").replace("there", str(tmp_path)) + "; import agents.triage"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", late], env=environment, cwd=tmp_path).returncode == 0
