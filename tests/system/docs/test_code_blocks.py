"""The code in README and docs comes from files that run, or is run, and its commands are ones that there are.

A comment above each fenced block says which of these it is; it does not show in the rendered page:

- `from: PATH`: part of that file, but for its indentation; tested where the file is
- `run: FILE::TEST`: that test takes the block from the page and runs it
- `output of: COMMAND`
- `example: not run, because …`, of commands only
- `drawing`: no code
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer._click.exceptions import BadOptionUsage, ClickException, MissingParameter
from typer.main import get_command

from docs.pages import files_of_test
from holdfast.cli.app import app
from holdfast.cli.new import files
from holdfast.dev.stack import ROOT, Stack
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.temporal import binary
from tests.system.docs.blocks import PAGES, Block, blocks, code_without_a_fence, commands

BLOCKS = [block for page in PAGES for block in blocks(page) if block.text]
KINDS = {
    "python": {"from", "run"},
    "json": {"from", "run"},
    "yaml": {"from", "run"},
    "sh": {"run", "example"},
    "toml": {"from", "run"},
    "text": {"output of", "drawing"},
}
"""What a block of a language may say of itself."""
TYPED = "test_code_blocks.py::test_commands_run_on_the_embedded_stack"


def test_code_and_commands_are_found():
    assert len(BLOCKS) >= 80
    assert sum(1 for page in PAGES for _ in commands(page)) >= 100
    assert sum(block.said.get("run") == TYPED for block in BLOCKS) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_code_says_where_it_is_from(page: Path):
    assert list(code_without_a_fence(page)) == [], "indented code: put a fence around it, and say where it is from"
    found = [block for block in BLOCKS if block.page == page]
    assert len(found) * 2 == sum(line.lstrip().startswith("```") for line in page.read_text().splitlines())
    for block in found:
        assert block.language in KINDS, f"{block}: the language is one of {', '.join(KINDS)}"
        said = KINDS[block.language] & block.said.keys()
        assert len(said) == 1, f"{block}: say above it one of {', '.join(sorted(KINDS[block.language]))}"
        if "example" in said:
            assert block.said["example"].startswith("not run, because "), f"{block}: say why it is not run"


@pytest.mark.parametrize("block", [each for each in BLOCKS if "from" in each.said], ids=str)
def test_a_block_is_part_of_the_file_that_it_names(block: Block):
    shown = block.text.rstrip().splitlines()
    lines = _file(block.said["from"]).splitlines()
    parts = (lines[at : at + len(shown)] for at in range(len(lines)))
    assert any(textwrap.dedent("\n".join(part)).splitlines() == shown for part in parts), (
        f"{block} is no part of {block.said['from']}"
    )


@pytest.mark.parametrize("block", [each for each in BLOCKS if "run" in each.said], ids=str)
def test_a_test_runs_the_block_that_names_it(block: Block):
    file, _, name = block.said["run"].partition("::")
    (path,) = files_of_test(file, name)
    takes = block.said["run"] == TYPED or block.page.relative_to(ROOT).as_posix() in path.read_text()
    assert takes, f"{block}: {file} does not take a block from that page"


@pytest.mark.parametrize("block", [each for each in BLOCKS if each.said.get("run") == TYPED], ids=str)
def test_commands_run_on_the_embedded_stack(block: Block, stack: Stack, tmp_path: Path):
    (tmp_path / "uv").write_text(f'#!/bin/sh\nshift\nexec {sys.executable} "$@"\n')
    (tmp_path / "temporal").write_text(f'#!/bin/sh\nexec {binary("temporal")} "$@"\n')
    for name in ("uv", "temporal"):
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", block.text],
        cwd=ROOT,
        env={**stack.environment, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"


def _file(path: str) -> str:
    if (ROOT / path).exists():
        return (ROOT / path).read_text()
    if "/" not in path:
        (found,) = (ROOT / "tests").rglob(path)  # a test file goes by its name, wherever it lies
        return found.read_text()
    return files(Path(path).parts[1])[Path(path).name]  # what `new` writes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_have_the_options_that_it_tells(page: Path):
    wrong = [f"{written}: {why}" for written, words, typed in commands(page) if (why := _complaint(words, typed))]
    assert not wrong


def _complaint(words: list[str], typed: bool) -> str:
    """What the command line says of these arguments; one that is only mentioned may lack some."""
    command = get_command(app)
    try:
        while words != ["…"]:
            context = command.make_context(command.name, list(words))
            words = [*getattr(context, "_protected_args", ()), *context.args]
            if not words or not hasattr(command, "resolve_command"):
                break
            _, command, words = command.resolve_command(context, words)  # pyright: ignore[reportAttributeAccessIssue]
    except (MissingParameter, BadOptionUsage) as error:
        return error.format_message() if typed else ""
    except ClickException as error:
        return error.format_message()
    return ""
