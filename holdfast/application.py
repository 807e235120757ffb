"""The names of the application around the library, in a process of somebody else's: a team's tests and programs.

In a clone `workflows`, `activities` and `agents` stand beside `holdfast/`. The installed package has them inside of it,
because other packages have these names too: in a team's environment they must overwrite nothing.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from holdfast.files import ROOT

NAMES = ("activities", "agents", "workflows")


class NameTaken(ImportError):
    """A package that is not Holdfast's has one of its names in this process."""


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [str(ROOT)]) if fullname in NAMES else None


_FINDER = _Finder()


def claim() -> None:
    """From now on these names mean Holdfast's packages in this process, whatever stands first on its path.

    Raises NameTaken when another package of such a name is imported already.
    """
    if _FINDER in sys.meta_path:
        return
    for name in NAMES:
        where = getattr(sys.modules.get(name), "__file__", None) or str(ROOT)
        if not Path(where).resolve().is_relative_to(ROOT):
            raise NameTaken(f"the package {name} of {where} has the name of one of Holdfast's: give yours another one")
    sys.meta_path.insert(0, _FINDER)


def run(program: str) -> None:
    """Becomes `starter.py` or `worker.py` of the Holdfast that is installed here. Does not return."""
    claim()
    runpy.run_path(str(ROOT / program), run_name="__main__")
