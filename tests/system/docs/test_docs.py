"""What README and docs say is so: links lead somewhere, named tests exist, tables agree with the code."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer import Typer

from docs.pages import files_of_test
from holdfast.cli.app import app
from holdfast.cli.new import files
from holdfast.contracts.run import RunOutcome
from holdfast.settings import Settings

ROOT = Path(__file__).parents[3]
PARTS = ("activities", "agents", "bench", "deploy", "docs", "holdfast", "tests", "workflows")
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
GUARANTEES = sorted((DOCS / "reference/guarantees").glob("*.md"))
LINK = re.compile(r"!?\[([^\]]+)\]\(([^)\s]+)\)")
TEST = re.compile(r"\b(test_\w+\.py)::(test_\w+)")
PATH = re.compile(rf"`((?:{'|'.join(PARTS)})/[\w/.-]+\.(?:py|ya?ml))`")


def links() -> list[tuple[Path, str, str]]:
    return [(page, text, target) for page in PAGES for text, target in LINK.findall(page.read_text())]


def rows(text: str, after: str) -> list[list[str]]:
    """The cells of the first table that follows `after`, without its head."""
    table = re.search(r"((?:^\|.*\n)+)", text[text.index(after) :], re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.group().splitlines()[2:]]


@pytest.mark.parametrize(("page", "text", "target"), links(), ids=lambda value: getattr(value, "name", value))
def test_a_link_leads_somewhere(page: Path, text: str, target: str):
    if target.startswith("https://"):
        return
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), f"{page.name}: {target}"
    if anchor:
        heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_test_that_a_page_names_is_one_test(page: Path):
    wrong = {f"{file}::{name}": len(files_of_test(file, name)) for file, name in TEST.findall(page.read_text())}
    assert {name: found for name, found in wrong.items() if found != 1} == {}, "how many files define such a test"


def test_every_promise_names_its_tests_and_the_page_that_explains_it():
    promises = rows((DOCS / "reference/promises.md").read_text(), "## What is promised")
    assert len(promises) > 40
    assert [promise for promise, tests, more in promises if not TEST.search(tests) or not LINK.search(more)] == []
    explained = {Path(target).name for _, _, more in promises for _, target in LINK.findall(more)}
    assert {page.name for page in GUARANTEES} - explained == set(), "a guarantee without a promise in the table"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_file_that_a_page_names_exists(page: Path):
    made = {f"agents/meetings/{name}" for name in files("meetings")}  # what `new` writes
    assert [each for each in PATH.findall(page.read_text()) if each not in made and not (ROOT / each).exists()] == []
    tests = {path.name for part in PARTS for path in (ROOT / part).rglob("test_*.py")} | {"test_meetings.py"}
    assert set(re.findall(r"\btest_\w+\.py\b", page.read_text())) <= tests


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_function_that_a_page_names_is_in_its_file(page: Path):
    for path, name in re.findall(r"`([\w/]+/\w+\.py)::([\w.]+)`", page.read_text()):
        *inside, function = name.split(".")
        body = ast.parse((ROOT / path).read_text()).body
        for each in inside:
            body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == each), [])
        defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert function in defined, f"{page.name}: {path} has no {name}"


def test_a_page_that_code_names_exists():
    sources = [*ROOT.glob("*.*"), *(path for part in PARTS for path in (ROOT / part).rglob("*.*"))]
    for source in sources:
        if source.suffix in (".py", ".yml", ".yaml", ".toml"):
            for page in re.findall(r"\bdocs/[\w/-]+\.md", source.read_text()):
                assert (ROOT / page).exists(), f"{source.relative_to(ROOT)}: {page}"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_a_page_says_first_what_it_is_for_and_the_list_of_pages_has_it(page: Path):
    title, _, first, *_ = page.read_text().splitlines()
    assert title.startswith("# ") and first.startswith(("This page ", "This tutorial "))
    listed = {(DOCS / target).resolve() for _, target in LINK.findall((DOCS / "README.md").read_text())}
    assert page in {DOCS / "README.md", *(Path(str(each).partition("#")[0]) for each in listed)}


def test_the_table_of_settings_is_the_code():
    def written(value: object) -> str:
        if isinstance(value, SecretStr):
            return value.get_secret_value()
        if value in (None, (), {}):
            return ""
        return f"{value:g}" if isinstance(value, float) else str(value)

    page = (DOCS / "reference/settings.md").read_text()
    told = {name.strip("`"): default.strip("`") for name, default, _ in rows(page, "## All settings")}
    fields = (field for field in Settings.model_fields.values() if field.alias)
    assert told == {str(field.alias): written(field.default) for field in fields}


def test_the_table_of_outcomes_is_the_code():
    table = rows((DOCS / "reference/commands.md").read_text(), "\n| outcome ")
    told = {outcome: (undoes == "yes", int(code)) for outcome, _, _, undoes, code in table}
    assert told == {outcome.value: (outcome.unwinds, outcome.exit_code) for outcome in RunOutcome}


def groups_of_commands() -> dict[str | None, set[str]]:
    return {group.name: names(group.typer_instance) for group in app.registered_groups if group.typer_instance}


def test_the_table_of_commands_has_every_command():
    table = rows((DOCS / "reference/commands.md").read_text(), "\n| `starter.py …`")
    told = {name for cells, _ in table for name in re.findall(r"`([^`]+)`", cells)}
    assert names(app) - told == set()
    assert {f"{group} {name}" for group, each in groups_of_commands().items() for name in each} - told == set()


def test_every_command_that_is_told_exists():
    groups = groups_of_commands()
    known = names(app) | set(groups)
    for page in PAGES:
        for name in re.findall(r"starter\.py (\w[\w-]*)", page.read_text()):
            assert name in known, f"{page.name}: starter.py {name}"
        for group, name in re.findall(
            rf"(?:starter\.py |`)({'|'.join(filter(None, groups))}) ([a-z]+)", page.read_text()
        ):
            assert name in groups[group], f"{page.name}: {group} {name}"


def names(commands: Typer) -> set[str]:
    return {each.name or each.callback.__name__ for each in commands.registered_commands if each.callback}


@pytest.mark.parametrize("page", GUARANTEES, ids=lambda page: page.stem)
def test_a_guarantee_says_what_it_promises_how_its_limits_and_what_shows_it(page: Path):
    heads = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
    assert heads == ["Promise", "Mechanism", "Limits", "Shown by"]
    shown = page.read_text().partition("## Shown by")[2]
    assert TEST.search(shown)


def test_every_task_that_is_told_exists():
    tasks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["poe"]["tasks"]
    for page in PAGES:
        for name in re.findall(r"\bpoe (\w+)", page.read_text()):
            assert name in tasks, f"{page.name}: poe {name}"


def test_the_counters_that_are_told_are_those_that_are_sent():
    sent = set(re.findall(r'"(holdfast\.[a-z_.]+)"', (ROOT / "holdfast/telemetry/metrics.py").read_text()))
    page = (DOCS / "how-to/operations.md").read_text()
    assert {counter.strip("`") for counter, _, _ in rows(page, "### Counters")} == sent
    assert set(re.findall(r"holdfast_\w+", page)) == {f"{name.replace('.', '_')}_total" for name in sent}
