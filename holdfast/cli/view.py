"""How the terminal shows a run: pure functions from its status or result to rich renderables."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from holdfast.cli.output import money, seconds
from holdfast.contracts.people import Approval
from holdfast.contracts.run import Phase, RunOutcome, RunResult, RunStatus, Stands, StepState, StepStatus, UndoRecord
from holdfast.contracts.tool_call import UndoStatus
from holdfast.contracts.turn import Usage
from holdfast.contracts.wording import answer_commands, in_words

MARKS: dict[StepStatus, tuple[str, str]] = {
    StepStatus.TODO: ("·", "dim"),
    StepStatus.ACTIVE: ("▸", "cyan"),
    StepStatus.WAITING: ("?", "bold yellow"),
    StepStatus.DONE: ("✓", "green"),
    StepStatus.PENDING: ("…", "yellow"),
    StepStatus.FAILED: ("✗", "red"),
    StepStatus.REJECTED: ("✗", "red"),
    StepStatus.UNDONE: ("↶", "magenta"),
}
COLOURS: dict[str, str] = {
    RunOutcome.COMPLETED: "green",
    RunOutcome.PARTIAL: "yellow",
    RunOutcome.REJECTED: "magenta",
    RunOutcome.FAILED: "red",
    RunOutcome.CANCELLED: "magenta",
    Phase.WAITING_HUMAN: "yellow",
    Phase.PARKED: "yellow",
    Phase.COMPENSATING: "magenta",
}
UNDO_WORDS = {
    UndoStatus.REGISTERED: "to be undone",
    UndoStatus.UNDONE: "undone",
    UndoStatus.NOTHING: "never happened, nothing to undo",
    UndoStatus.FAILED: "could NOT be undone",
}


def status_view(workflow_id: str, status: RunStatus, ask: bool = True) -> RenderableType:
    """The live display of a run. ask: include the open approvals and the commands that answer them."""
    word = word_of(status)
    head = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=100, completed=status.percent, width=24, complete_style="green", finished_style="green")
    head.add_row(Text(workflow_id, "bold"), Text(word, COLOURS.get(word, "cyan")), bar, Text(f"{status.percent} %"))
    parts: list[RenderableType] = [head, steps_view(status.steps)]
    if status.line:
        parts.append(Text(status.line, "italic"))
    if ask:
        parts += [approval_view(workflow_id, approval) for approval in status.approvals]
    if status.undone and status.phase is Phase.COMPENSATING:
        parts.append(undone_view(status.undone))
    parts += [stands_line(each) for each in status.stands]
    parts += [Text(f"note: {note}", "dim") for note in status.notes[-3:]]
    parts.append(usage_line(status.usage, status.model, status.turn, status.calls))
    return Group(*parts)


def asking_view(asking: list[str], see: str) -> list[RenderableType]:
    """Which runs of a batch wait for a person, and where to answer them."""
    if not asking:
        return []
    more = f" and {len(asking) - 3} more" if len(asking) > 3 else ""
    return [Text(f"waits for a person: {', '.join(asking[:3])}{more}", "bold yellow"), Text(f"answer {see}", "yellow")]


def word_of(status: RunStatus) -> str:
    """The run's phase, or its outcome once compensation is complete."""
    return str(status.phase if status.phase is Phase.COMPENSATING else status.outcome or status.phase)


def steps_view(steps: list[StepState]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=3, justify="right")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for step in steps:
        mark, style = MARKS[step.status]
        word = {StepStatus.TODO: "", StepStatus.ACTIVE: "running", StepStatus.WAITING: "waits for approval"}.get(
            step.status, str(step.status)
        )
        if step.status is StepStatus.PENDING and step.role:
            word += f" ({step.role})"
        words = shortened(step.detail or step.origin)
        table.add_row(Text(mark, style), Text(step.name, style), Text(word, style), Text(words, "dim"))
    return table


def shortened(text: str, width: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def approval_view(workflow_id: str, approval: Approval, hint: bool = True) -> RenderableType:
    """A request to a person, with the arguments in full, because the decision is about them."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=3)
    grid.add_column(style="yellow", no_wrap=True)
    grid.add_column(overflow="fold")
    head = {"tool": "approval", "outcome": "question"}.get(approval.kind, approval.kind)
    grid.add_row("", Text(f"{head} {approval.id}", "bold yellow"), Text(approval.subject, "bold"))
    if approval.role:
        due = f", usually by {approval.eta:%H:%M} UTC" if approval.eta else ""
        grid.add_row("", "for", Text(f"{approval.role}{due}"))
    if approval.why:
        grid.add_row("", "why", Text(approval.why))
    for name, value in approval.arguments.items():
        grid.add_row("", Text(name), Text(in_words(value, between="\n")))
    if approval.evidence:
        grid.add_row("", "when asked", Text(approval.evidence))
    if approval.key:
        grid.add_row("", "key", Text(approval.key))
    if hint:
        for n, command in enumerate(answer_commands(workflow_id, approval)):
            grid.add_row("", "" if n else "answer", Text(f"uv run starter.py {command}"))
    return grid


def stands_line(effect: Stands) -> Text:
    return Text(f"still stands: {effect}: {effect.why}", "red")


def undone_view(undone: list[UndoRecord]) -> RenderableType:
    """The compensations in the order in which they run: the last effect first."""
    table = Table.grid(padding=(0, 2))
    table.add_column(width=3, justify="right")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for entry in reversed(undone):
        style = "red" if entry.status is UndoStatus.FAILED else "magenta"
        words = UNDO_WORDS[entry.status] + (f": {entry.note}" if entry.note else "")
        if entry.status is not UndoStatus.FAILED:  # a person must act on failures: show them in full
            words = shortened(words)
        table.add_row(Text("↶", style), Text(entry.tool, style), Text(words))
    return table


def usage_line(usage: Usage, model: str, turns: int, calls: int) -> Text:
    tokens = usage.input_tokens + usage.output_tokens
    text = f"turns {turns} · tool calls {calls} · model calls {usage.calls} · tokens {tokens:,} · "
    line = Text(text + money(usage.cost_usd, usage.unpriced), "dim")
    if model:
        line.append("  ").append(model, "yellow" if "simulated" in model else "dim")
    return line


def result_view(workflow_id: str, result: RunResult) -> RenderableType:
    colour = COLOURS.get(result.outcome, "cyan")
    head = Table.grid(padding=(0, 2))
    head.add_row(Text(workflow_id, "bold"), Text(str(result.outcome), f"bold {colour}"))
    parts: list[RenderableType] = [head, steps_view(result.steps)]
    if result.reason:
        parts.append(Text(f"reason: {result.reason}"))
    if result.summary:
        parts.append(Text(result.summary))
    if not result.steps:
        parts += [Text(f"note: {note}", "dim") for note in result.notes[-1:]]
    if result.said:
        parts.append(Text("(--json also shows what the agent said at the run's end)", "dim"))
    for pending in result.pending:
        review = f", for {pending.role} review" if pending.role else ""
        parts.append(Text(f"pending: {pending.step}{review}: {pending.what}", "yellow"))
    if result.undone:
        parts.append(undone_view(result.undone))
    parts += [stands_line(each) for each in result.stands]
    for done in result.decisions:
        words = f"{done.decision.verdict} by {done.decision.approver}: {done.approval.subject}"
        parts.append(Text(words + (f" ({done.decision.comment})" if done.decision.comment else ""), "dim"))
    if result.human_wait_s:
        parts.append(Text(f"waited for a human: {seconds(result.human_wait_s)}", "dim"))
    parts.append(usage_line(result.usage, result.model, result.turns, result.calls))
    if result.trace_id:
        parts.append(Text(f"trace {result.trace_id}", "dim"))
    return Group(*parts)


def plain_line(status: RunStatus) -> str:
    """A status as one line, for output that is not a terminal."""
    return f"{status.percent:3d} %  {word_of(status)}: {status.line}"
