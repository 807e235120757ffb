"""`new --repo`: from an empty folder to a green test and a run, with Holdfast as an installed package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.dev.stack import ROOT, without_ours
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.stack import processes_of, until

AGENT = "meetings"


def new(folder: Path, *options: str, agent: str = AGENT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "starter.py"), "new", "--repo", str(folder), *options, agent]
    return subprocess.run(command, capture_output=True, text=True, env=without_ours(os.environ))


class Team:
    """Somebody who has nothing but the repository that `new` wrote, and uv."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = without_ours(os.environ)
        for name in ("VIRTUAL_ENV", "PYTHONPATH"):
            kept.pop(name, None)
        # The versions that this checkout is tested with.
        dated = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["exclude-newer"]
        self.environment = {**kept, "UV_EXCLUDE_NEWER": dated, "UV_PYTHON": sys.executable, "PYTEST_ADDOPTS": ""}

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            ["uv", "run", "--quiet", *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def up(self) -> Iterator[None]:
        command = [str(self.folder / ".venv/bin/python"), "-u", "starter.py", "up"]
        with (self.folder / "up.log").open("w") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)
        home = self.folder / ".holdfast"
        until(lambda: (home / "stack.json").exists() or process.poll() is not None)
        try:
            yield
        finally:
            process.terminate()
            assert process.wait(PATIENCE_S) == 0, (self.folder / "up.log").read_text()
        assert processes_of(home) == []


@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("uv"), reason="needs uv, as a team has it")
def test_from_an_empty_folder_to_a_green_test_and_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "ward-agents"
    made = new(folder)
    assert made.returncode == 0, made.stderr
    assert "uv run pytest" in made.stdout and f"uv run starter.py run {AGENT} --follow" in made.stdout
    # Temporal's users have packages of these names, and OpenAI's SDK is `agents`: they must not stand in the way.
    for name in ("workflows", "activities"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('the team has its own')")

    team = Team(folder)
    assert "2 passed" in team("pytest")
    listed = {each["name"]: each for each in json.loads(team("starter.py", "agents", "--json"))}
    assert listed[AGENT]["from"] == str(folder / "ward_agents")
    assert not any((folder / ".venv").glob("lib/*/site-packages/agents")), "a name that is not ours to take"
    with team.up():
        run = json.loads(team("starter.py", "run", AGENT, "--json"))["workflow_id"]
        until(lambda: json.loads(team("starter.py", "approvals", run, "--json")))
        team("starter.py", "approve", run, "--by", "you")
        assert "The people are invited." in team("starter.py", "follow", run)

        team("starter.py", "new", "letters")
        assert (folder / "ward_agents/letters/spec.py").exists()
        until(lambda: "ward_agents/ has changed (letters/" in (folder / "up.log").read_text())
    assert "letters" in team("starter.py", "agents")


def test_where_holdfast_comes_from_is_one_line(tmp_path: Path) -> None:
    def line(*options: str) -> str:
        folder = tmp_path / f"team{len([*tmp_path.iterdir()])}"
        assert new(folder, *options).returncode == 0
        return json.dumps(tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["uv"]["sources"]["holdfast"])

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    git = "ssh://git@example.com/platform/holdfast.git"
    assert json.loads(line()) == {"path": str(ROOT), "package": True}
    assert json.loads(line("--holdfast", f"{git}@v0.3.0")) == {"git": git, "tag": "v0.3.0"}
    assert json.loads(line("--holdfast", git)) == {"git": git, "tag": f"v{version}"}


def test_what_cannot_be_is_refused_in_a_line_and_nothing_is_written(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes").write_text("mine")
    for folder, options, says in (
        (full, (), "is not an empty folder: name one that is empty"),
        (full / "notes", (), "is not an empty folder"),
        (tmp_path / "agents", (), "a package named 'agents' exists already"),
        (tmp_path / "json", (), "a package named 'json' exists already"),
        (tmp_path / "2nd", (), "'2nd' cannot name a package"),
        (tmp_path / "team", ("--holdfast", str(full)), "is no checkout of Holdfast: name one, or a git address"),
    ):
        done = new(folder, *options)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert says in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes"]


def test_a_cloned_repository_without_files_is_empty_enough(tmp_path: Path) -> None:
    (tmp_path / "team" / ".git").mkdir(parents=True)
    assert new(tmp_path / "team").returncode == 0


def test_the_docs_show_what_it_writes(tmp_path: Path) -> None:
    assert new(tmp_path / "ward-agents", "--holdfast", "https://git.example.com/holdfast.git@v0.2.0").returncode == 0
    page = (ROOT / "docs/how-to/own-repository.md").read_text()
    (shown,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    assert shown in (tmp_path / "ward-agents/pyproject.toml").read_text()
