"""Each process imports only what it needs: that is most of the memory of a worker, and of the time of a command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from holdfast.dev.stack import ROOT, Stack

GRAPH = {"langgraph", "langchain_core", "langsmith"}
MODEL = {"openai", "genai_prices"}
SERVERS = {"mcp"}
MIGRATION = {"alembic", "sqlalchemy"}
ENCRYPTION = {"cryptography"}
EXPORT = {"opentelemetry.exporter"}


def _imported(program: str, environment: Mapping[str, str] = os.environ) -> set[str]:
    """Returns which of these packages are there when the program has run."""
    everything = GRAPH | MODEL | SERVERS | MIGRATION | ENCRYPTION | EXPORT
    ask = f"import sys; print(*({everything!r} & sys.modules.keys()), file=sys.stderr)"
    command = [sys.executable, "-c", f"{program}\n{ask}"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "command",
    ["--help", "agents", "tools", "list", "approvals", "orphans", "limits", "breakers list", "dlq list", "payloads"],
)
def test_a_command_that_needs_no_graph_and_no_model_imports_neither(stack: Stack, command: str) -> None:
    program = f"import sys; sys.argv[1:] = {command.split()!r}; from holdfast.cli.app import main; assert main() == 0"
    assert _imported(program, stack.environment) & (GRAPH | MODEL) == set()


def test_a_worker_imports_nothing_that_it_was_not_told_to_use() -> None:
    program = "import worker, workflows.serving; from holdfast.reasoning.loading import load_graphs; load_graphs()"
    assert _imported(program) == GRAPH | MODEL
