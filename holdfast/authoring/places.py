"""Where agents are: `agents/`, the folders of `HOLDFAST_AGENTS`, and packages that are installed beside Holdfast.

A place is a folder with one folder for each agent. The agents of `HOLDFAST_AGENTS` become part of the package `agents`,
so they are imported as `agents.NAME.spec` like the shipped ones. An installed package keeps its own name: it says that
it has agents by an entry point in the group `holdfast.agents`, whose value is the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from holdfast.application import claim
from holdfast.files import ROOT
from holdfast.settings import settings

GROUP = "holdfast.agents"


@dataclass(frozen=True)
class Place:
    """A folder with agents, and the package as part of which they are imported."""

    package: str
    folder: Path

    def having(self, file: str) -> list[str]:
        """The names of the agents' folders that have this file."""
        return sorted(path.parent.name for path in self.folder.glob(f"*/{file}"))

    def shown(self, file: str) -> str:
        """How people read the path of a file: `agents/triage/spec.py`, or the whole path when it is not shipped."""
        return f"agents/{file}" if self == SHIPPED else str(self.folder / file)


SHIPPED = Place("agents", ROOT / "agents")


@dataclass(frozen=True)
class Places:
    there: tuple[Place, ...]
    lacking: dict[str, str]
    """By folder of `HOLDFAST_AGENTS` or name of an entry point: why no agents can be there, and what to do."""


@cache
def places() -> Places:
    """All places, the shipped one first, then installed packages, then `HOLDFAST_AGENTS`."""
    claim()
    found, lacking = [SHIPPED], dict[str, str]()
    for point in sorted(entry_points(group=GROUP), key=lambda each: each.name):
        try:
            found += [Place(point.value, folder) for folder in _folders(point)]
        except Exception as error:  # noqa: BLE001 - a parent package runs code of its own; the error is kept and shown
            lacking[point.name] = (
                f"entry point {point.name} = {point.value!r} in {GROUP} names no package that is installed ({error}):"
                " name the package whose folders are agents"
            )
    package = import_module("agents").__path__
    for folder in settings().agent_folders:
        if wrong := unfit(folder):
            lacking[str(folder)] = wrong
        elif folder not in [each.folder for each in found]:
            package.append(str(folder))
            found.append(Place("agents", folder))
    return Places(tuple(dict.fromkeys(found)), lacking)


def _folders(point: EntryPoint) -> list[Path]:
    spec = find_spec(point.value)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("it is not found" if spec is None else "it is a module without folders")
    return [Path(each) for each in spec.submodule_search_locations]


def unfit(folder: Path) -> str:
    """Why a folder of `HOLDFAST_AGENTS` cannot be one, and what to do; empty when it can."""
    if not folder.is_dir():
        return f"HOLDFAST_AGENTS names {folder}, and there is no such folder: correct it, or make the folder"
    if (folder / "spec.py").exists():
        return f"HOLDFAST_AGENTS names {folder}, which is an agent itself: name the folder above it, {folder.parent}"
    return ""


def missing_folders() -> list[str]:
    """Why folders of `HOLDFAST_AGENTS` cannot be ones, in one line each."""
    return list(filter(None, map(unfit, settings().agent_folders)))


def file_of(module: str) -> str:
    """How people read the path of a module's file, also when it cannot be imported."""
    for place in places().there:
        file = f"{module.removeprefix(f'{place.package}.').replace('.', '/')}.py"
        if module.startswith(f"{place.package}.") and (place.folder / file).exists():
            return place.shown(file)
    return f"{module.replace('.', '/')}.py"
