"""JSON data in words, and commands, for people who decide on it."""

from __future__ import annotations

import json

from holdfast.contracts import Approval


def in_words(value: object, between: str = "; ") -> str:
    """`name: Ibuprofen, dosage: as needed; name: …`. between: what parts the items of a list that have parts."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {in_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        parts = any(isinstance(each, dict | list) for each in value)
        return (between if parts else ", ").join(in_words(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def answer_commands(workflow_id: str, approval: Approval) -> tuple[str, ...]:
    """The commands that answer it, that for yes first."""
    if approval.kind == "outcome":
        settle = f"settle {workflow_id} {approval.id}"
        return f"{settle} --happened --comment '…'", f"{settle} --did-not --comment '…'"
    if approval.kind == "question":
        return (f"answer {workflow_id} {approval.id} '…'",)
    yes, no = f"approve {workflow_id} {approval.id}", f"reject {workflow_id} {approval.id} --reason '…'"
    return (yes, f"edit {workflow_id} {approval.id} --set NAME=VALUE", no) if approval.kind == "tool" else (yes, no)
