"""What README and docs say is so: links lead somewhere, named tests exist, tables agree with the code."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer import Typer

from holdfast.cli.app import app
from holdfast.contracts.run import RunOutcome
from holdfast.settings import Settings

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
GUARANTEES = sorted((DOCS / "guarantees").glob("*.md"))
LINK = re.compile(r"!?\[([^\]]+)\]\(([^)\s]+)\)")


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
    if text.startswith("test_"):
        assert re.search(rf"^\s*(async )?def {text}\(", file.read_text(), re.MULTILINE), f"no {text} in {path}"


def test_every_promise_names_its_test():
    promises = rows((DOCS / "promises.md").read_text(), "## What is promised")
    assert len(promises) > 10
    assert all(LINK.match(test) and LINK.match(test).group(1).startswith("test_") for _, test in promises)  # pyright: ignore[reportOptionalMemberAccess]


def test_the_table_of_settings_is_the_code():
    def written(value: object) -> str:
        if isinstance(value, SecretStr):
            return value.get_secret_value()
        if value in (None, (), {}):
            return ""
        return f"{value:g}" if isinstance(value, float) else str(value)

    page = (DOCS / "settings.md").read_text()
    told = {name.strip("`"): default.strip("`") for name, default, _ in rows(page, "## All settings")}
    fields = (field for field in Settings.model_fields.values() if field.alias)
    assert told == {str(field.alias): written(field.default) for field in fields}


def test_the_table_of_outcomes_is_the_code():
    table = rows((DOCS / "commands.md").read_text(), "\n| outcome ")
    told = {outcome: (undoes == "yes", int(code)) for outcome, _, _, undoes, code in table}
    assert told == {outcome.value: (outcome.unwinds, outcome.exit_code) for outcome in RunOutcome}


def test_every_command_that_is_told_exists():
    groups = {group.name: names(group.typer_instance) for group in app.registered_groups if group.typer_instance}
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
    if page.name == "README.md":
        listed = {target for _, target in LINK.findall(page.read_text())}
        assert {each.name for each in GUARANTEES} - {page.name} <= listed
        return
    heads = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
    assert heads == ["Promise", "Mechanism", "Limits", "Shown by"]
    shown = page.read_text().partition("## Shown by")[2]
    assert any(text.startswith("test_") for text, _ in LINK.findall(shown))


def test_every_task_that_is_told_exists():
    tasks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["poe"]["tasks"]
    for page in PAGES:
        for name in re.findall(r"\bpoe (\w+)", page.read_text()):
            assert name in tasks, f"{page.name}: poe {name}"


def test_the_counters_that_are_told_are_those_that_are_sent():
    sent = set(re.findall(r'"(holdfast\.[a-z_.]+)"', (ROOT / "holdfast/telemetry/metrics.py").read_text()))
    page = (DOCS / "operations.md").read_text()
    assert {counter.strip("`") for counter, _, _ in rows(page, "### Counters")} == sent
    assert set(re.findall(r"holdfast_\w+", page)) == {f"{name.replace('.', '_')}_total" for name in sent}
