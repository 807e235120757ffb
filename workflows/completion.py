"""Whether a run may end, and how. Pure decisions over the state."""

from __future__ import annotations

from datetime import datetime

from holdfast.contracts.data import digest
from holdfast.contracts.people import Verdict
from holdfast.contracts.run import RunOutcome, StepState, StepStatus, awaiting
from holdfast.contracts.turn import OutcomeStatus, Wait
from workflows.state import Ending, RunState, ToolEnd

MAX_REPEATS = 3
"""This many turns in a row with the calls and outcomes of the turn before are a loop."""
MAX_REFUSALS = 3
"""After this many attempts of the model to finish without a critical step the run fails."""


def out_of_turns(state: RunState) -> Ending | None:
    if state.profile and state.turn >= state.profile.max_turns:
        return Ending(RunOutcome.FAILED, f"max turns: {state.turn} turns and not finished")
    return None


def offer_again(state: RunState, now: datetime) -> str:
    """Offers withdrawn tools again, once, when the model ends without their step. Returns the notice for the model.

    A call of such a tool is deferred until the service answers, within the tool's deadline, as if the run had opened
    the circuit breaker itself. Empty when there is no such step, or when the run has to end anyway.
    """
    missing = state.missing()
    if not missing or _rejected(state) or gone(state.steps()):
        return ""
    tools = [tool for names in missing.values() for tool in names]
    state.offered |= dict.fromkeys(tools, now)
    return (
        f"These steps have no outcome yet: {', '.join(missing)}. You can call their tools again: {', '.join(tools)}."
        " Their service may still not answer: then the platform defers the call, makes it as soon as the service is"
        " back, and tells you how it ended. Call them if the work needs them, then finish."
    )


def out_of_patience(state: RunState, wait: Wait, now: datetime) -> None:
    """Gives up the tools of `RunState.lost` when the turn has waited long enough for their server."""
    for tool in state.lost():
        policy = state.policy(tool)
        if policy and policy.service == wait.service:
            detail = f"{wait.why}; gave up after {policy.deadline_s:.0f} s, and it was never called"
            state.ends[tool] = ToolEnd(status=OutcomeStatus.FAILED, seq=0, detail=detail)
        else:
            state.offered[tool] = now  # the turn waited for another service


def judge_final(state: RunState, final: str) -> Ending | str:
    """The end, if every critical step has an outcome; otherwise the notice that names the steps without one."""
    steps = state.steps()
    if rejected := _rejected(state):
        return Ending(RunOutcome.REJECTED, f"rejected by the human: {', '.join(rejected)}: {_comments(state)}", final)
    if ended := gone(steps):
        return ended
    todo = [s for s in steps if s.critical and s.status is StepStatus.TODO]
    if missing := ", ".join(s.name for s in todo):
        state.refusals += 1
        if state.refusals >= MAX_REFUSALS:
            return Ending(RunOutcome.FAILED, f"critical step gone: {missing}: {_never_done(state)}", final)
        return f"Finishing is refused: these critical steps have no outcome yet: {missing}. Do them, then finish."
    if pending := state.pending():
        return Ending(RunOutcome.PARTIAL, awaiting(steps, pending), final)
    return Ending(RunOutcome.COMPLETED, "", final)


def judge_turn(state: RunState) -> Ending | None:
    """After the calls of a turn: the ending, if the run can no longer succeed."""
    same = digest([[c.call.tool, c.call.arguments, c.outcome and c.outcome.content] for c in state.calls])
    state.repeats = state.repeats + 1 if same == state.last_turn else 0
    state.last_turn = same
    if ended := gone(state.steps()):
        return ended
    if state.repeats >= MAX_REPEATS:
        times = MAX_REPEATS + 1
        return Ending(RunOutcome.FAILED, f"loop without progress: the same calls with the same outcomes {times} times")
    return None


def gone(steps: list[StepState]) -> Ending | None:
    """A critical step that failed for good ends the run."""
    first = next((s for s in steps if s.critical and s.status is StepStatus.FAILED), None)
    return Ending(RunOutcome.FAILED, f"critical step gone: {first.name}: {first.detail}") if first else None


def _never_done(state: RunState) -> str:
    """A text about the critical steps without an outcome."""
    todo = {step.name for step in state.steps() if step.critical and step.status is StepStatus.TODO}
    said: list[str] = []
    for spec in state.profile.steps if state.profile else []:
        if spec.name in todo:
            uncalled = [f"`{tool}`" for tool in spec.tools if tool not in state.ends and tool not in state.refused]
            if uncalled:
                said.append("the model ended without calling " + (" or " if spec.one_of else " and ").join(uncalled))
            said += [
                f"the last call of `{t}` was refused: {state.refused[t]}" for t in spec.tools if t in state.refused
            ]
            said += [f"`{t}` failed: {end.detail}" for t in spec.tools if (end := state.ends.get(t)) and end.detail]
    return "; ".join(said if state.seq else [*said, "it never called a tool"])


def _comments(state: RunState) -> str:
    """The comments of the rejections that stand. Of several calls of a tool, the last one counts."""
    last = {end.seq for end in state.ends.values() if end.status is OutcomeStatus.REJECTED}
    decided = (d for d in state.approvals.decided.values() if d.decision.verdict is Verdict.REJECT)
    return "; ".join(d.decision.comment for d in decided if d.approval.seq in last)


def _rejected(state: RunState) -> list[str]:
    """Critical steps, and tools without a step, whose last call a person rejected."""
    steps = [s.name for s in state.steps() if s.critical and s.status is StepStatus.REJECTED]
    return steps + [t for t in state.stray_tools() if state.ends[t].status is OutcomeStatus.REJECTED]
