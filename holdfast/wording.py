"""JSON data in words, and commands, for people who decide on it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from shlex import quote

from holdfast.contracts import Approval, Stands

YOUR_NAME, WHY, WHAT_WAS_DONE, YOUR_ANSWER, DOTS = "YOUR NAME", "WHY", "WHAT WAS DONE", "YOUR ANSWER", "…"
"""What our commands print where a person has to put words. `holdfast.door` does not take them for an answer."""


ID = 0.85
"""How alike two ids have to be: many begin with the same words."""


def did_you_mean(name: str, known: Iterable[str], alike: float = 0.6) -> str:
    """`; did you mean digest?`, or nothing when none of the known names is like it."""
    there = {each.lower(): each for each in known}
    # A name that is longer is none, and to compare it would take long.
    close = get_close_matches(name.lower(), there, n=1, cutoff=alike) if len(name) <= 200 else ()
    return f"; did you mean {quote(there[close[0]])}?" if close else ""


def in_words(value: object, between: str = "; ") -> str:
    """`name: Ibuprofen, dosage: as needed; name: …`. between: what parts the items of a list that have parts."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {in_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        parts = any(isinstance(each, dict | list) for each in value)
        return (between if parts else ", ").join(in_words(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def standing(stands: list[Stands]) -> str:
    """`Still stands: notify_patient #7, pay #9 and 3 more`, or nothing."""
    more = f" and {len(stands) - 3} more" if len(stands) > 3 else ""
    return f"Still stands: {', '.join(map(str, stands[:3]))}{more}" if stands else ""


def answer_commands(workflow_id: str, approval: Approval) -> tuple[str, ...]:
    """The commands that answer it, that for yes first."""
    workflow_id = quote(workflow_id)
    if approval.kind == "outcome":
        settle = f"settle {workflow_id} {approval.id}"
        return f"{settle} --happened --comment '{DOTS}'", f"{settle} --did-not --comment '{DOTS}'"
    if approval.kind == "question":
        return (f"answer {workflow_id} {approval.id} '{DOTS}'",)
    yes, no = f"approve {workflow_id} {approval.id}", f"reject {workflow_id} {approval.id} --reason '{DOTS}'"
    return (yes, f"edit {workflow_id} {approval.id} --set NAME=VALUE", no) if approval.kind == "tool" else (yes, no)
