"""What a run shows its readers: a line, a percentage, a page for the Web UI, the result. All are pure functions."""

from __future__ import annotations

import json
import shlex
from datetime import datetime
from math import ceil

from temporalio import workflow

from holdfast.contracts.people import Approval
from holdfast.contracts.run import (
    AgentInput,
    Phase,
    RunOutcome,
    RunResult,
    RunStatus,
    StepState,
    StepStatus,
    UndoRecord,
    percent,
)
from holdfast.contracts.tool_call import UndoStatus
from holdfast.contracts.turn import Usage
from holdfast.contracts.wording import WHAT_WAS_DONE, WHY, YOUR_ANSWER, YOUR_NAME, in_words, standing
from workflows.state import Ending, RunState

TICKS = {
    StepStatus.TODO: "·",
    StepStatus.ACTIVE: "▸",
    StepStatus.WAITING: "?",
    StepStatus.DONE: "✓",
    StepStatus.PENDING: "…",
    StepStatus.FAILED: "✗",
    StepStatus.REJECTED: "✗",
    StepStatus.UNDONE: "↩",
}

DECIDE = "decide"
"""The Signal that answers an approval."""

ESCAPED = str.maketrans({char: f"\\{char}" for char in "\\`*_[]<>#|!"})
"""Characters that Markdown would read as markup."""

MAX_SHOWN = 10_000
"""Characters of an argument that the page shows."""
MAX_ROWS = 10
"""Questions, and undos, that the page shows. Rendering hundreds of them would cost the run more than its work."""


def line(agent: str, steps: list[StepState], doing: str, now: datetime) -> str:
    """'Discharge in progress: 4/6 steps complete. Pharmacy coordination pending pharmacist review. ETA 5 minutes. …'"""
    parts = [f"{agent.capitalize()} in progress: {_tally(steps)}"] if steps else []
    return ". ".join([*parts, *_troubles(steps, now), *([doing] if doing else [])])


def headline(agent: str, state: RunState, ending: Ending | None, now: datetime) -> str:
    if ending is None:
        return line(agent, state.steps(), state.doing(), now)
    steps = state.steps()
    ended = f"{agent.capitalize()} {ending.outcome}" + (f": {_tally(steps)}" if steps else "")
    # The lines about pending steps already say what a partial run waits for.
    reason = "" if ending.outcome is RunOutcome.PARTIAL else ending.reason
    if state.phase is Phase.COMPENSATING:
        return ". ".join([ended, *filter(None, [reason, state.doing()])])
    left = standing(state.stands()) if ending.outcome.unwinds else ""
    return ". ".join([ended, *_troubles(steps, None), *filter(None, [reason, left])])


def _tally(steps: list[StepState]) -> str:
    return f"{_done(steps)}/{len(steps)} steps complete"


def _troubles(steps: list[StepState], now: datetime | None) -> list[str]:
    """A sentence for each step that did not go as it should."""
    said: list[str] = []
    for step in steps:
        name = step.title or step.name
        if step.status is StepStatus.PENDING:
            said.append(f"{name} pending" + (f" {step.role} review" if step.role else "") + _eta(step.eta, now))
        elif step.status in (StepStatus.FAILED, StepStatus.REJECTED):
            said.append(f"{name} {step.status}")
        elif step.origin and step.status is StepStatus.DONE:
            said.append(f"{name} by {step.origin}".replace("by settled by", "settled by"))
    return said


def _eta(eta: datetime | None, now: datetime | None) -> str:
    if eta is None or now is None:
        return ""
    minutes = ceil((eta - now).total_seconds() / 60)
    return f". ETA {minutes} minute{'s' * (minutes != 1)}" if minutes > 0 else ". Overdue"


def evidence(state: RunState) -> str:
    """What a person should know of the run so far before a decision."""
    steps = state.steps()
    ahead = (StepStatus.TODO, StepStatus.ACTIVE, StepStatus.WAITING)
    behind = [s for s in steps if s.status not in ahead]
    said = [
        f"{s.name} {s.status}" + (f" ({s.role})" if s.status is StepStatus.PENDING and s.role else "") for s in behind
    ]
    return f"{_done(steps)}/{len(steps)} steps complete: {', '.join(said)}" if steps else f"turn {state.turn}"


def signal_data(approval_id: str, verdict: str, **more: str) -> str:
    """The data of the Signal that answers an approval, with placeholders for the person's own words."""
    body = {"approval_id": approval_id, "verdict": verdict, "approver": YOUR_NAME, **more}
    # Short lines: the page cuts off what does not fit.
    return json.dumps(body).replace(', "approver"', ',\n "approver"')


def signal_command(workflow_id: str, data: str) -> str:
    """The exact Temporal CLI command that sends this Signal."""
    return (
        f"temporal workflow signal --workflow-id {shlex.quote(workflow_id)} \\\n"
        f"  --name decide --input \\\n{shlex.quote(data)}"
    )


def page(agent: str, workflow_id: str, state: RunState, ending: Ending | None) -> str:
    """The Markdown that the Web UI shows as the run's current details."""
    parts = [f"**{plain(headline(agent, state, ending, workflow.now()))}**"]
    if steps := state.steps():
        parts.append(
            "\n".join(
                f"- {TICKS[s.status]} {s.title or s.name}: {s.status}{_deferred(s.detail or s.origin)}" for s in steps
            )
        )
    asked = list(state.approvals.open.values())
    if asked:
        parts.append(_how_to_answer(workflow_id))
    parts += [_question(workflow_id, approval, state) for approval in asked[:MAX_ROWS]]
    if (more := len(asked) - MAX_ROWS) > 0:
        see = f"uv run starter.py approvals {shlex.quote(workflow_id)}"
        parts.append(f"### {more} more questions\n`{see}` shows them all.")
    undone = _undos(state)
    undone.sort(key=lambda undo: undo.status is not UndoStatus.FAILED)
    if ending and ending.outcome.unwinds and (stands := state.stands()):
        rows = [f"- {plain(each)}: {plain(each.why)}" for each in stands[:MAX_ROWS]]
        rows += [f"- … and {more} more"] if (more := len(stands) - MAX_ROWS) > 0 else []
        parts.append("### Still stands\nWhat was done and is not undone:\n\n" + "\n".join(rows))
    if rows := [f"- undo of #{u.seq} {u.tool}: {u.status}{_deferred(u.note)}" for u in undone[:MAX_ROWS]]:
        rows += [f"- … and {more} more"] if (more := len(undone) - MAX_ROWS) > 0 else []
        parts.append("### Undo\n" + "\n".join(rows))
    if state.notes:
        parts.append("### Notes\n" + "\n".join(f"- {plain(note)}" for note in state.notes[-10:]))
    if state.used.calls:
        parts.append(f"Model {state.model}: {cost(state.used)}")
    return "\n\n".join(parts)


def _undos(state: RunState) -> list[UndoRecord]:
    """The undos that succeeded or failed; while the run unwinds, also those still to run."""
    unwinds = state.phase is Phase.COMPENSATING
    return [u for u in state.saga if unwinds or u.status is not UndoStatus.REGISTERED]


def _how_to_answer(workflow_id: str) -> str:
    return (
        "### How to answer\n"
        "Replace the words in capitals with your own. There are two ways to send an answer:\n\n"
        f"- On this page: **More Actions**, **Send a Signal**, `{DECIDE}`, with the JSON below as its data.\n"
        "- In a shell: the command below, with `--address` of this server. "
        f"`uv run starter.py approvals {shlex.quote(workflow_id)}` prints shorter ones."
    )


def _question(workflow_id: str, approval: Approval, state: RunState) -> str:
    arguments = "\n".join(f"- {name}: {plain(_short(in_words(value)))}" for name, value in approval.arguments.items())
    match approval.kind:
        case "outcome":
            step = state.step_of(approval.subject)
            review = f", for {approval.role} review" if approval.role else ""
            head = f"### {plain((step and step.title) or approval.step or approval.subject)}: question `{approval.id}`"
            head += plain(review)
            answers = {
                "It happened, or you have done it yourself": ("happened", {"comment": WHAT_WAS_DONE}),
                "It did not happen, and it was not done in another way": ("did_not", {"comment": WHY}),
            }
        case "refusal":
            head = f"### Waiting for a human: the model refuses (`{approval.id}`)"
            answers = {"Ask again": ("approve", {}), "End the run": ("reject", {"comment": WHY})}
        case "question":
            head = f"### The agent asks: question `{approval.id}`"
            head += plain(f", for {approval.role}") if approval.role else ""
            answers = {"Answer": ("answer", {"answer": YOUR_ANSWER})}
        case _:
            head = f"### Waiting for a human: approval `{approval.id}`"
            head += plain(f", for {approval.role}") if approval.role else ""
            head += f"\n`{approval.subject}` wants to run."
            answers = {"Approve": ("approve", {}), "Reject": ("reject", {"comment": WHY})}
    both: list[str] = []
    for what, (verdict, more) in answers.items():
        data = signal_data(approval.id, verdict, **more)
        both.append(f"{what}:\n\n```\n{data}\n```\n\n```\n{signal_command(workflow_id, data)}\n```")
    asked = f"When asked: {plain(approval.evidence)}"
    parts = [f"{head}\n{plain(approval.why)}", arguments, asked, "\n".join(both)]
    return "\n\n".join(part for part in parts if part)


def _short(text: str) -> str:
    """The beginning of a long text: a browser cannot use a page of a megabyte."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} … ({len(text):,} characters in all)"


def cost(usage: Usage) -> str:
    unpriced = f" ({usage.unpriced} calls without a known price)" if usage.unpriced else ""
    return f"{usage.calls} calls, {usage.input_tokens} + {usage.output_tokens} tokens, ${usage.cost_usd:.4f}{unpriced}"


def status(given: AgentInput, state: RunState, ending: Ending | None) -> RunStatus:
    """Answer of the query `status`."""
    steps = state.steps()
    return RunStatus(
        agent=given.agent,
        phase=state.phase,
        line=headline(given.agent, state, ending, workflow.now()),
        percent=percent(steps),
        steps=steps,
        approvals=list(state.approvals.open.values()),
        notes=state.notes,
        turn=state.turn,
        calls=state.seq,
        usage=state.used,
        model=state.model,
        key_base=state.key_base,
        trace_id=given.trace_id,
        undone=_undos(state),
        outcome=ending.outcome if ending else None,
        stands=state.stands() if ending and ending.outcome.unwinds else [],
    )


def result(given: AgentInput, state: RunState, ending: Ending) -> RunResult:
    """The result of a run that has ended."""
    unchecked = state.profile is not None and not state.profile.steps
    note = f"The agent {given.agent} declares no steps, so its result was not checked. Tool calls made: {state.seq}"
    return RunResult(
        outcome=ending.outcome,
        summary=ending.summary,
        reason=ending.reason,
        agent=given.agent,
        key_base=state.key_base,
        steps=state.steps(),
        pending=state.pending(),
        undone=state.saga if ending.outcome.unwinds else [],
        usage=state.used,
        model=state.model,
        turns=state.turn,
        calls=state.seq,
        failures=state.failures,
        human_wait_s=state.approvals.waited_s,
        decisions=list(state.approvals.decided.values()),
        trace_id=given.trace_id,
        percent=percent(state.steps()),
        models=state.models if len(state.models) > 1 else {},
        notes=state.notes[-20:] + [note] * unchecked,
        webhook=given.webhook,
        stands=state.stands() if ending.outcome.unwinds else [],
    )


def _done(steps: list[StepState]) -> int:
    return sum(step.status is StepStatus.DONE for step in steps)


def _deferred(text: str) -> str:
    return f" ({plain(text)})" if text else ""


def plain(value: object) -> str:
    """Escapes text of a model or a service, so that it cannot act as markup on this page."""
    return " ".join(str(value).split()).translate(ESCAPED)
