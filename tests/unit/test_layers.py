"""What docs/explanation/architecture.md says of imports: which package may import which, and no cycle anywhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

import pytest

from holdfast.files import ROOT

FOLDERS = ("holdfast", "workflows", "activities", "agents")
APPLICATION = ("agents", "workflows", "activities", "worker", "starter")


def _modules() -> dict[str, ast.Module]:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if not path.name.startswith("test_")]
    files += [ROOT / "worker.py", ROOT / "starter.py"]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    return {name: ast.parse(path.read_text()) for name, path in names.items()}


def _imported(tree: ast.Module) -> Iterator[str]:
    """Every name that is imported anywhere in the file, in functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{each.name}" for each in node.names)


def arrows() -> dict[str, set[str]]:
    """By module, the modules of ours that it imports."""
    modules = _modules()
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in modules.items():
        for each in _imported(tree):
            target = each if each in modules else each.rpartition(".")[0]
            # `holdfast` itself imports on demand what it offers to agents: nothing in the library imports it.
            if target in modules and name != "holdfast":
                found[name].add(target)
    return found


def _package(module: str) -> str:
    return ".".join(module.split(".")[:2]) if module.startswith(("holdfast.", "agents.")) else module.split(".")[0]


def _is_sorted(graph: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"an import cycle: {' → '.join(error.args[1])}")


def test_no_import_cycle_between_files() -> None:
    _is_sorted(arrows())


def test_no_import_cycle_between_packages() -> None:
    packages: dict[str, set[str]] = {}
    for module, targets in arrows().items():
        packages.setdefault(_package(module), set()).update(map(_package, targets))
    _is_sorted({name: targets - {name} for name, targets in packages.items()})


ASSEMBLY = ("holdfast.testing",)
"""What puts library and application together, for tests of agents."""


def _assembles(module: str) -> bool:
    return f"{module}.".startswith(tuple(f"{each}." for each in ASSEMBLY))


def test_the_library_does_not_import_the_application() -> None:
    wrong = {
        module: sorted(each for each in targets if each.split(".")[0] in APPLICATION)
        for module, targets in arrows().items()
        if module.startswith("holdfast.") and not _assembles(module)
    }
    assert {module: targets for module, targets in wrong.items() if targets} == {}


def test_only_tests_import_what_puts_both_together() -> None:
    wrong = [module for module, targets in arrows().items() if any(map(_assembles, targets)) and not _assembles(module)]
    assert wrong == []


def test_nothing_imports_the_two_programs() -> None:
    assert [module for module, targets in arrows().items() if targets & {"worker", "starter"}] == []


PUBLIC = ("contracts", "authoring", "reasoning", "ext", "files", "dev.simulation")


def test_agents_use_the_platform_by_its_public_modules() -> None:
    wrong = {
        module: sorted(each for each in targets if each.startswith("holdfast.") and not _is_public(each))
        for module, targets in arrows().items()
        if module.startswith("agents.")
    }
    assert {module: targets for module, targets in wrong.items() if targets} == {}


def _is_public(module: str) -> bool:
    return f"{module}.".startswith(tuple(f"holdfast.{each}." for each in PUBLIC))
