"""What a run tells its readers: one line, a percentage, and a page for the Web UI. Pure functions over the state."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable

from holdfast.contracts import Approval, StepState, StepStatus, UndoRecord, Usage

TICKS = {
    StepStatus.TODO: "☐",
    StepStatus.ACTIVE: "▶",
    StepStatus.WAITING: "⏸",
    StepStatus.DONE: "✅",
    StepStatus.PENDING: "⏳",
    StepStatus.FAILED: "❌",
    StepStatus.REJECTED: "🚫",
    StepStatus.UNDONE: "↩",
}


def percent(steps: Iterable[StepState]) -> int:
    """Share of the steps that are done, 0…100; 0 for an agent without steps."""
    all_steps = list(steps)
    done = sum(step.status is StepStatus.DONE for step in all_steps)
    return 100 * done // len(all_steps) if all_steps else 0


def line(steps: Iterable[StepState], doing: str) -> str:
    """'4/6 steps complete. pharmacy pending pharmacist. <doing>'"""
    all_steps = list(steps)
    parts = []
    if all_steps:
        done = sum(step.status is StepStatus.DONE for step in all_steps)
        parts.append(f"{done}/{len(all_steps)} steps complete")
    parts += [f"{s.name} pending {s.role or 'review'}" for s in all_steps if s.status is StepStatus.PENDING]
    parts += [f"{s.name} {s.status}" for s in all_steps if s.status in (StepStatus.FAILED, StepStatus.REJECTED)]
    if doing:
        parts.append(doing)
    return ". ".join(parts)


def signal_command(workflow_id: str, approval_id: str, verdict: str = "approve", comment: str = "") -> str:
    """The exact command that answers an approval with the plain Temporal CLI."""
    body = {"approval_id": approval_id, "verdict": verdict, "approver": "YOUR NAME"} | (
        {"comment": comment} if comment else {}
    )
    return (
        f"temporal workflow signal --workflow-id {shlex.quote(workflow_id)} --name decide "
        f"--input {shlex.quote(json.dumps(body))}"
    )


def details(
    workflow_id: str,
    headline: str,
    steps: Iterable[StepState],
    approvals: Iterable[Approval],
    undone: Iterable[UndoRecord],
    notes: list[str],
    usage: Usage,
    model: str,
) -> str:
    """The Markdown that the Web UI shows as the run's current details."""
    parts = [f"**{headline}**"]
    ticks = [f"- {TICKS[s.status]} {s.name}: {s.status}" + (f" ({s.detail})" if s.detail else "") for s in steps]
    if ticks:
        parts.append("\n".join(ticks))
    for approval in approvals:
        arguments = "\n".join(f"- {name}: {value}" for name, value in approval.arguments.items())
        parts.append(
            f"### Waiting for a human: approval `{approval.id}`\n"
            f"`{approval.subject}` wants to run. {approval.why}\n\n{arguments}\n\n"
            f"So far: {approval.evidence}\n\nApprove:\n\n```\n{signal_command(workflow_id, approval.id)}\n```\n"
            f"Reject:\n\n```\n{signal_command(workflow_id, approval.id, 'reject', 'WHY')}\n```"
        )
    undo = [f"- undo of #{u.seq} {u.tool}: {u.status}" + (f" ({u.note})" if u.note else "") for u in undone]
    if undo:
        parts.append("### Undo\n" + "\n".join(undo))
    if notes:
        parts.append("### Notes\n" + "\n".join(f"- {note}" for note in notes[-10:]))
    if usage.calls:
        cost = f"${usage.cost_usd:.4f}" + (f" ({usage.unpriced} calls without a known price)" if usage.unpriced else "")
        tokens = f"{usage.input_tokens} + {usage.output_tokens} tokens"
        parts.append(f"Model {model}: {usage.calls} calls, {tokens}, {cost}")
    return "\n\n".join(parts)
