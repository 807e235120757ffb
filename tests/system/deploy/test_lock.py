"""`requirements.lock`, which the image installs from, is in step with `pyproject.toml` and with what is tested."""

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
LOCK = (ROOT / "requirements.lock").read_text()
PINS = re.compile(r"^([A-Za-z0-9._-]+)(\[.*?\])?==([^\s;\\]+)(?: ;([^\\\n]*))?", re.MULTILINE)


def locked() -> dict[str, str]:
    """Version by package, of the lines that apply on this platform."""
    found = {}
    for name, extra, pinned, marker in PINS.findall(LOCK):
        requirement = Requirement(f"{name}{extra}=={pinned}" + (f"; {marker}" if marker else ""))
        if requirement.marker is None or requirement.marker.evaluate():
            found[canonicalize_name(name)] = pinned
    return found


def test_every_direct_dependency_is_locked_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for each in map(Requirement, project["dependencies"]):
        name = canonicalize_name(each.name)
        assert name in locked(), f"{name} is not in requirements.lock: run `uv run poe lock`"
        assert each.specifier.contains(locked()[name]), f"{name} {locked()[name]} is outside {each.specifier}"


def test_the_locked_versions_are_the_ones_that_are_tested():
    installed = {canonicalize_name(each.name): each.version for each in distributions()}
    other = {name: (pinned, installed.get(name)) for name, pinned in locked().items() if installed.get(name) != pinned}
    assert not other, f"locked and installed versions differ: {other}; run `uv run poe lock`"


def test_every_package_is_pinned_with_hashes():
    for line in (entry for entry in re.split(r"\n(?=\S)", LOCK) if entry.strip()):
        assert re.match(PINS, line), f"not pinned to one version: {line.splitlines()[0]}"
        assert "--hash=sha256:" in line, f"no hash: {line.splitlines()[0]}"


def test_the_lock_names_no_host():
    assert "://" not in LOCK
    assert "-index" not in LOCK
    assert "--find-links" not in LOCK
