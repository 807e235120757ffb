"""Formats JSON data and commands for the people who decide."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from shlex import quote

from holdfast.contracts.people import Approval
from holdfast.contracts.run import Stands

YOUR_NAME, WHY, WHAT_WAS_DONE, YOUR_ANSWER, DOTS = "YOUR NAME", "WHY", "WHAT WAS DONE", "YOUR ANSWER", "…"
"""Placeholders in printed commands, which a person replaces. `door` refuses them."""


ID = 0.85
"""Required similarity of two ids: many ids begin with the same words."""


def did_you_mean(name: str, known: Iterable[str], alike: float = 0.6) -> str:
    """Returns `; did you mean digest?`, or nothing when no known name is similar."""
    there = {each.lower(): each for each in known}
    # A longer text is not a name, and comparing it would take long.
    close = get_close_matches(name.lower(), there, n=1, cutoff=alike) if len(name) <= 200 else ()
    return f"; did you mean {quote(there[close[0]])}?" if close else ""


def in_words(value: object, between: str = "; ") -> str:
    """Formats data as `name: Ibuprofen, dosage: as needed; name: …`. between: separates list items that have parts."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {in_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        parts = any(isinstance(each, dict | list) for each in value)
        return (between if parts else ", ").join(in_words(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def standing(stands: list[Stands]) -> str:
    """Returns `Still stands: notify_patient #7, pay #9 and 3 more`, or nothing."""
    more = f" and {len(stands) - 3} more" if len(stands) > 3 else ""
    return f"Still stands: {', '.join(map(str, stands[:3]))}{more}" if stands else ""


def answer_commands(workflow_id: str, approval: Approval) -> tuple[str, ...]:
    """Returns the commands that answer an approval, the one for yes first."""
    workflow_id = quote(workflow_id)
    if approval.kind == "outcome":
        settle = f"settle {workflow_id} {approval.id}"
        return f"{settle} --happened --comment '{DOTS}'", f"{settle} --did-not --comment '{DOTS}'"
    if approval.kind == "question":
        return (f"answer {workflow_id} {approval.id} '{DOTS}'",)
    yes, no = f"approve {workflow_id} {approval.id}", f"reject {workflow_id} {approval.id} --reason '{DOTS}'"
    return (yes, f"edit {workflow_id} {approval.id} --set NAME=VALUE", no) if approval.kind == "tool" else (yes, no)
