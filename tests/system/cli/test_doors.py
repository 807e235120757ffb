"""Every command with every kind of bad value: one line on stderr and status 2, never a traceback, never status 70."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from holdfast.cli.lookup import link
from holdfast.contracts.people import Approval
from holdfast.contracts.wording import answer_commands
from holdfast.dev.stack import ROOT, Stack, without_ours
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.stack import Cli

DEEP = '{"a":' * 3000 + "1" + "}" * 3000
LONG = "x" * 100_000
RUN = "run-that-is-not-there"

COMMANDS: dict[str, list[str]] = {
    "run": ["run", "discharge", "-i", "VALUE"],
    "run agent": ["run", "VALUE"],
    "run --id": ["run", "discharge", "-i", '{"patient_id": "pat-1"}', "--id", "VALUE"],
    "run --webhook": ["run", "discharge", "-i", '{"patient_id": "pat-1"}', "--webhook", "VALUE"],
    "run field": ["run", "discharge", "-i", '{"patient_id": VALUE}'],
    "list -n": ["list", "-n", "VALUE"],
    "list --batch": ["list", "--batch", "VALUE"],
    "status": ["status", "VALUE"],
    "follow": ["follow", "VALUE"],
    "result": ["result", "VALUE"],
    "approvals": ["approvals", "VALUE"],
    "approve": ["approve", "VALUE"],
    "approve id": ["approve", RUN, "VALUE"],
    "approve --by": ["approve", RUN, "--by", "VALUE"],
    "approve --comment": ["approve", RUN, "--comment", "VALUE"],
    "reject --reason": ["reject", RUN, "--reason", "VALUE"],
    "edit --set": ["edit", RUN, "--set", "a=VALUE"],
    "edit --arguments": ["edit", RUN, "--arguments", "VALUE"],
    "answer": ["answer", RUN, "q1", "VALUE"],
    "answer --value": ["answer", RUN, "q1", "VALUE", "--value"],
    "message": ["message", RUN, "VALUE"],
    "cancel": ["cancel", "VALUE"],
    "settle": ["settle", "VALUE", "step", "--happened"],
    "settle --result": ["settle", RUN, "step", "--happened", "--result", "VALUE"],
    "dlq show": ["dlq", "show", "VALUE"],
    "dlq drop": ["dlq", "drop", "VALUE", "--why", "VALUE"],
    "dlq list --kind": ["dlq", "list", "--kind", "VALUE"],
    "dlq list --state": ["dlq", "list", "--state", "VALUE"],
    "dlq replay": ["dlq", "replay", "VALUE", "--yes"],
    "orphans --older-than": ["orphans", "--older-than", "VALUE"],
    "claims --older-than": ["claims", "--older-than", "VALUE"],
    "breakers trip": ["breakers", "trip", "VALUE"],
    "breakers reset": ["breakers", "reset", "VALUE"],
    "tools": ["tools", "VALUE"],
    "new": ["new", "VALUE"],
    "codec-server --port": ["codec-server", "--port", "VALUE"],
}
VALUES = {
    "empty": "",
    "blank": " \t",
    "dash": "-",
    "deep": DEEP,
    "long": LONG,
    "huge number": "1" + "0" * 20,
    "nan": "nan",
    "digits": "9" * 5000,
    "not UTF-8": "\udcff",
    "surrogate": '"\\ud800"',
    "markup": "[/bold][red]x[/]",
    "slashes": "../../" + "a/b" * 3,
    "quotes": "a'b\"c`$(x)",
    "script": "日本 Müller",
    "null": "null",
}


@pytest.fixture
def away(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line in a folder where a value cannot name a file of the project."""
    monkeypatch.chdir(tmp_path)
    return cli


@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_value_of_a_command_is_a_traceback(away: Cli, command: str) -> None:
    for name in VALUES:
        if (command, name) in STARTS:
            continue
        done = away(*(each.replace("VALUE", VALUES[name]) for each in COMMANDS[command]))
        assert "Traceback" not in done.stderr, (name, done.stderr[-2000:])
        assert done.returncode in (0, 1, 2), (name, done.returncode, done.stderr)
        if done.returncode == 2:
            (line,) = [each for each in done.stderr.splitlines() if not each.startswith("note: ")]
            assert line.startswith("error: ") and len(line) < 2000, (name, line[:300])


STARTS = {("codec-server --port", "empty"), ("new", "nan"), ("new", "null")}
"""What is good: it would begin something."""


# ------------------------------------------------------------------ what surrounds the command


def shell(line: str, environment: Mapping[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A line of the shell, in which `$starter` is the command line."""
    starter = f"{sys.executable} {ROOT / 'starter.py'}"
    command = ["bash", "-o", "pipefail", "-c", line]
    env = {**environment, "starter": starter}
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S)


def one_line(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert says in lines[0], lines[0]


def nowhere(home: Path) -> dict[str, str]:
    return {**without_ours(os.environ), "HOLDFAST_HOME": str(home)}


def test_a_reader_that_goes_away_is_no_failure(tmp_path: Path) -> None:
    for command in ("agents", "tools", "tools --json", "--help"):
        done = shell(f"$starter {command} | head -c 1", nowhere(tmp_path))
        assert (done.returncode, done.stderr) == (0, ""), command
        done = shell(f"$starter {command} | true", nowhere(tmp_path))
        assert (done.returncode, done.stderr) == (0, ""), command


def test_a_stdout_that_is_full_or_closed(tmp_path: Path) -> None:
    for command in ("agents", "agents --json"):
        one_line(shell(f"$starter {command} > /dev/full", nowhere(tmp_path)), "No space left on device")
        one_line(shell(f"$starter {command} >&-", nowhere(tmp_path)), "stdout is closed")


def test_a_stdin_that_is_closed_or_empty(cli: Cli) -> None:
    for line in ("run discharge -i - <&-", "run discharge -i - < /dev/null", "message run-1 - <&-"):
        one_line(shell(f"$starter {line}", cli.environment), "stdin, which is closed or empty")
    one_line(shell(r"printf '\xff' | $starter run discharge -i -", cli.environment), "UTF-8")


def test_a_terminal_without_utf8(tmp_path: Path) -> None:
    ascii = {**nowhere(tmp_path), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for command in ("agents", "tools", "doctor"):
        done = shell(f"$starter {command}", ascii)
        assert done.returncode == (command == "doctor"), done.stderr
        assert "Traceback" not in done.stderr and done.stdout.isascii()
    assert json.loads(shell("$starter agents --json", ascii).stdout)


def test_the_command_alone_shows_the_help(tmp_path: Path) -> None:
    done = shell("$starter", nowhere(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage" in done.stdout and "approvals" in done.stdout


@pytest.mark.parametrize("command", ["up", "migrate"])
def test_a_corrupt_store(tmp_path: Path, command: str) -> None:
    (tmp_path / "holdfast.db").write_bytes(b"this is no database, " * 500)
    one_line(shell(f"$starter {command}", nowhere(tmp_path)), "file is not a database")


@pytest.mark.parametrize("command", ["up", "migrate"])
@pytest.mark.parametrize("home", ["file", "under a file", "not ours"])
def test_a_home_that_cannot_be(tmp_path: Path, command: str, home: str) -> None:
    (tmp_path / "file").write_text("")
    at = {"file": tmp_path / "file", "under a file": tmp_path / "file" / "home", "not ours": Path("/proc/home")}[home]
    one_line(shell(f"$starter {command}", nowhere(at)), str(at))


@pytest.mark.parametrize("command", ["list", "doctor", "status r", 'run discharge -i \'{"patient_id": "p"}\''])
def test_a_profile_that_cannot_be_read(tmp_path: Path, command: str) -> None:
    broken = tmp_path / "temporal.toml"
    broken.write_text("[profile\n")
    one_line(shell(f"$starter {command}", {**nowhere(tmp_path), "TEMPORAL_CONFIG_FILE": str(broken)}), str(broken))
    broken.write_text("")
    unknown = {**nowhere(tmp_path), "TEMPORAL_CONFIG_FILE": str(broken), "TEMPORAL_PROFILE": "nowhere"}
    one_line(shell(f"$starter {command}", unknown), "TEMPORAL_PROFILE=nowhere")


@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff", '{"stack_temporal_address": 7}', "[" * 3000])
def test_a_broken_stack_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "stack.json").write_bytes(text.encode("latin-1"))
    done = shell("$starter list", nowhere(tmp_path))
    one_line(done, "stack" if text else "no Temporal server")
    worker = subprocess.run(
        [sys.executable, ROOT / "worker.py"], env=nowhere(tmp_path), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (worker.returncode, len(worker.stderr.strip().splitlines())) == (2, 1), worker.stderr


@pytest.mark.parametrize("text", ["{", "[1]", "", '{"temporal": "no", "ui": 99999999}', "[" * 3000])
def test_broken_ports_are_chosen_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "ports.json").write_text(text)
    (tmp_path / "stack.json").write_text("{")
    stack = Stack(tmp_path, nowhere(tmp_path))
    assert len({port for port in stack.ports.values() if 1024 <= port <= 65_535}) == 5


@pytest.mark.parametrize(("program", "says"), [("/nowhere/temporal", "no program"), ("/etc/passwd", "no program")])
def test_a_temporal_cli_that_is_none(tmp_path: Path, program: str, says: str) -> None:
    one_line(shell("$starter up", {**nowhere(tmp_path), "HOLDFAST_TEMPORAL_CLI": program}), says)


def test_ids_are_quoted_in_commands_and_encoded_in_links() -> None:
    approval = Approval.model_construct(id="a1", subject="book", kind="tool")
    assert answer_commands("discharge-a b'c", approval)[0] == """approve 'discharge-a b'"'"'c' a1"""

    class Namespace:
        namespace = "default"

    assert link(Namespace(), "discharge-a/b c?#ü").endswith(  # pyright: ignore[reportArgumentType]
        "/workflows/discharge-a%2Fb%20c%3F%23%C3%BC"
    )
