"""`starter.py new`: creates a working example agent."""

from __future__ import annotations

import keyword
import re
import shutil
from pathlib import Path

from holdfast.authoring.registry import agents, batches
from holdfast.cli.output import Refused, out, print_json
from holdfast.dev.stack import ROOT

SCAFFOLD = ROOT / "holdfast" / "dev" / "scaffold"


def files(name: str) -> dict[str, str]:
    """The files of a new agent, by their path relative to the checkout's root."""
    here = f"agents/{name}"
    made = {f"{here}/__init__.py": ""}
    for path, template in (("spec", "spec"), ("script", "script"), (f"test_{name}", "test")):
        made[f"{here}/{path}.py"] = (SCAFFOLD / f"{template}.txt").read_text().replace("NAME", name)
    return made


def new(name: str, as_json: bool) -> None:
    """Writes a new agent under `agents/`. Raises Refused when one of that name exists, or the name is not valid."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name) or keyword.iskeyword(name):
        raise Refused(
            f"{name!r} cannot be an agent's name: up to 40 lower-case letters, digits and underscores, a letter first"
        )
    folder = ROOT / "agents" / name
    for path in (folder, folder.with_suffix(".py")):  # Python would import the folder instead of such a file
        if path.exists():
            raise Refused(f"{path} exists already: choose another name, or edit what is there")
    if name in {**agents(), **batches()}:
        raise Refused(f"an agent or batch named {name!r} exists already: choose another name")
    made = files(name)
    try:
        folder.mkdir()
        for path, text in made.items():
            (ROOT / path).write_text(text)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)  # a partial agent would stop the others from being found
        if isinstance(error, OSError):
            raise Refused(f"cannot write {folder}: {error.strerror}") from None
        raise
    if as_json:
        print_json({"agent": name, "files": list(made)})
        return
    about = {"spec": "what it is: input, tools, steps", "script": "what the scripted model says as this agent"}
    for path in list(made)[1:]:
        out.print(f"{path:<{18 + 2 * len(name)}} [dim]{about.get(Path(path).stem, 'its test, on a real server')}[/dim]")
    follow = f"uv run starter.py run {name} --follow"
    out.print(
        f"\n[dim]in one terminal (an `up` that runs already takes the agent by itself):[/dim]\n"
        f"  uv run starter.py up\n"
        f"[dim]in another:[/dim]\n"
        f"  {follow}  [dim]# it stops and asks; then, in a third:[/dim]\n"
        f"  {'uv run starter.py approvals':<{len(follow)}}  [dim]# what it asks, and the command that answers[/dim]\n"
        f"  uv run pytest agents/{name}"
    )
