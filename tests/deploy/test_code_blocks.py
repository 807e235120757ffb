"""The code in README and docs is code that runs, and its commands are ones that there are.

A block of Python may say by a comment above it what it is: `<!-- path -->` a part of that file but for its indentation,
tested where the file is; `<!-- fragment -->` something that does not stand alone. Any other compiles and imports what
there is, and one that has imports names nothing unknown. The tutorial's commands are run: see test_tutorial.py.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from typer._click.exceptions import BadOptionUsage, ClickException, MissingParameter
from typer.main import get_command

from holdfast.cli.app import app
from holdfast.cli.new import files
from holdfast.dev.stack import ROOT
from tests.deploy.blocks import PAGES, Block, blocks, commands

PYTHON = [block for page in PAGES for block in blocks(page, "python")]


def test_code_and_commands_are_found():
    assert len(PYTHON) >= 5
    assert sum(1 for page in PAGES for _ in commands(page)) >= 40


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_block_of_python_is_code_that_runs(block: Block):
    if (path := next((each for each in block.said if each.endswith(".py")), None)) is not None:
        assert _unindented(block.text) in _unindented(_file(path)), f"{block} is no part of {path}"
        return
    tree = compile(block.text, str(block), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if "fragment" in block.said:
        return
    if any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body):
        _names_are_known(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, each.name) for each in node.names), f"{block}: {ast.unparse(node)}"
        elif isinstance(node, ast.Import):
            for each in node.names:
                importlib.import_module(each.name)


def _file(path: str) -> str:
    if (ROOT / path).exists():
        return (ROOT / path).read_text()
    return files(Path(path).parts[1])[path]  # what `new` writes


def _unindented(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def _names_are_known(block: Block) -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise", "-"]
    done = subprocess.run(ruff, input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, f"{block}: {done.stdout}if it does not stand alone, say <!-- fragment --> above it"


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
