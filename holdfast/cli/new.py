"""`starter.py new`: writes a working example agent, among others or in a repository of its own."""

from __future__ import annotations

import json
import keyword
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from holdfast.authoring.places import SHIPPED, Place, places
from holdfast.authoring.registry import agents, batches
from holdfast.cli.output import Refused, out, print_json
from holdfast.files import LIBRARY, ROOT

SCAFFOLD = LIBRARY / "dev" / "scaffold"
ABOUT = {"spec": "what it is: input, tools, steps", "script": "what the scripted model says as this agent"}
REPOSITORY = {
    "pyproject.toml": "pyproject",
    "README.md": "readme",
    "Dockerfile": "dockerfile",
    ".gitignore": "gitignore",
    "conftest.py": "conftest",
    "starter.py": "starter",
    "worker.py": "worker",
}
"""The files of a repository, and their templates."""


def files(name: str) -> dict[str, str]:
    """The files of a new agent, by their names in its folder."""
    made = {"__init__.py": ""}
    for file, template in (("spec", "spec"), ("script", "script"), (f"test_{name}", "test")):
        made[f"{file}.py"] = _filled(template, NAME=name)
    return made


def repository(name: str, package: str, source: str) -> dict[str, str]:
    """The files of a new repository with one agent. source: the line that says which Holdfast it uses."""
    words = {"PACKAGE": package, "PROJECT": package.replace("_", "-"), "SOURCE": source, "VERSION": _version()}
    made = {file: _filled(f"repository/{each}", **words, NAME=name) for file, each in REPOSITORY.items()}
    made[f"{package}/__init__.py"] = ""
    return made | {f"{package}/{name}/{file}": text for file, text in files(name).items()}


def _filled(template: str, **words: str) -> str:
    text = (SCAFFOLD / f"{template}.txt").read_text()
    return re.sub(r"PACKAGE|PROJECT|SOURCE|VERSION|NAME", lambda found: words[found[0]], text)


def new(name: str, as_json: bool) -> None:
    """Writes a new agent among others. Raises Refused when one of that name exists, or the name is not valid."""
    _is_name(name)
    place = _home()
    folder = place.folder / name
    for path in (folder, folder.with_suffix(".py")):  # Python would import the folder instead of such a file
        if path.exists():
            raise Refused(f"{path} exists already: choose another name, or edit what is there")
    if name in {**agents(), **batches()}:
        raise Refused(f"an agent or batch named {name!r} exists already: choose another name")
    made = files(name)
    _write(folder, made)
    shown = [_shown(folder / file) for file in made]
    if as_json:
        print_json({"agent": name, "files": shown})
        return
    for path in shown[1:]:
        about = ABOUT.get(Path(path).stem, "its test, on a real server")
        out.print(f"{path:<{max(map(len, shown))}} [dim]{about}[/dim]")
    follow = f"uv run starter.py run {name} --follow"
    out.print(
        f"\n[dim]in one terminal (an `up` that runs already takes the agent by itself):[/dim]\n"
        f"  uv run starter.py up\n"
        f"[dim]in another:[/dim]\n"
        f"  {follow}  [dim]# it stops and asks; then, in a third:[/dim]\n"
        f"  {'uv run starter.py approvals':<{len(follow)}}  [dim]# what it asks, and the command that answers[/dim]\n"
        f"  uv run pytest {_shown(folder)}"
    )


def new_repository(name: str, where: str, holdfast: str, as_json: bool) -> None:
    """Writes a repository with a new agent. holdfast: where it gets Holdfast from; empty: this checkout.

    Raises Refused when the folder is not empty, or a name or `holdfast` is not valid.
    """
    _is_name(name)
    folder = Path(where).expanduser().resolve()
    if folder.exists() and not (folder.is_dir() and {each.name for each in folder.iterdir()} <= {".git"}):
        raise Refused(f"{folder} is not an empty folder: name one that is empty, or that does not exist")
    made = repository(name, _package_of(folder), _source(holdfast))
    _write(folder, made)
    if as_json:
        print_json({"agent": name, "repository": str(folder), "files": [*made]})
        return
    out.print(f"{folder}: the agent {name}, its test, a Dockerfile", markup=False)
    run = f"uv run starter.py run {name} --follow"
    out.print(
        f"\n  cd {shlex.quote(where)}\n"
        f"  {'uv run pytest':<{len(run)}}  [dim]# installs Holdfast, and runs the agent's test[/dim]\n"
        f"  {'uv run starter.py up':<{len(run)}}  [dim]# in one terminal; then, in another:[/dim]\n"
        f"  {run}"
    )


def _is_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name) or keyword.iskeyword(name):
        raise Refused(
            f"{name!r} cannot be an agent's name: up to 40 lower-case letters, digits and underscores, a letter first"
        )


def _home() -> Place:
    """Where `new` writes: among the agents of the repository that one stands in, else in a clone's `agents/`.

    Raises Refused when there are none but those of installed packages.
    """
    ours = [each for each in places().there if not each.folder.is_relative_to(sys.prefix)]
    for place in ours:
        if place.folder.is_relative_to(Path.cwd()):
            return place
    if SHIPPED not in ours:
        raise Refused("there is no folder of agents here: run it in the repository of your agents, or add --repo DIR")
    return SHIPPED


def _package_of(folder: Path) -> str:
    """The name of a repository's package: that of its folder. Raises Refused when Python cannot use it."""
    name = re.sub(r"[-. ]", "_", folder.name.lower())
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise Refused(f"--repo: {folder.name!r} cannot name a package: use letters, digits and dashes, a letter first")
    there = find_spec(name)
    if there is not None and there.origin is not None:
        raise Refused(f"--repo: a package named {name!r} exists already ({there.origin}): name the folder otherwise")
    return name


def _source(where: str) -> str:
    """The line for `[tool.uv.sources]`: a checkout's path, or the address of a git repository with a tag after `@`."""
    address, _, tag = where.rpartition("@")
    if "://" in where:
        if "/" in tag or not address:  # the @ belongs to the address
            address, tag = where, f"v{_version()}"
        return f"holdfast = {{ git = {_quoted(address)}, tag = {_quoted(tag)} }}"
    checkout = Path(where).expanduser().resolve() if where else ROOT
    if not (checkout / "pyproject.toml").exists() or not (checkout / "holdfast").is_dir():
        raise Refused(
            f"--holdfast: {where or checkout} is no checkout of Holdfast: name one, or a git address as https://…@TAG"
        )
    return f"holdfast = {{ path = {_quoted(str(checkout))}, package = true }}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _version() -> str:
    project = ROOT / "pyproject.toml"
    return tomllib.loads(project.read_text())["project"]["version"] if project.exists() else version("holdfast")


def _write(folder: Path, made: Mapping[str, str]) -> None:
    """Writes all the files or, when that fails, none. Raises Refused."""
    before = {*folder.iterdir()} if folder.exists() else None
    try:
        for file, text in made.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
    except BaseException as error:
        _take_back(folder, before)
        if isinstance(error, OSError):
            raise Refused(f"cannot write {folder}: {error.strerror}") from None
        raise


def _take_back(folder: Path, before: set[Path] | None) -> None:
    """A partial agent would be a broken one. before: what was in the folder; None: there was no folder."""
    if before is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in {*folder.iterdir()} - before:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _shown(path: Path) -> str:
    """A path as one types it here; that of a clone's agent relative to the clone."""
    here = [each for each in (Path.cwd(), ROOT) if path.is_relative_to(each)]
    return str(path.relative_to(here[0])) if here else str(path)
