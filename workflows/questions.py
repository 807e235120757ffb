"""What a run asks people, and what their answers change. Pure functions over the state."""

from __future__ import annotations

from datetime import datetime, timedelta

from holdfast.contracts.data import digest
from holdfast.contracts.people import Approval, ApprovalDecision, Verdict
from holdfast.contracts.tool_call import Outcome
from holdfast.contracts.turn import OutcomeStatus, Question
from workflows import progress
from workflows.state import CallState, Deferred, RunState, ToolEnd

SUBJECT = 80
"""Characters of a question that are shown where it takes one line."""


def may_run(state: RunState, item: CallState, now: datetime) -> Approval:
    """The request for approval of this call."""
    call = item.call
    why = f"Every call of {call.tool} needs a person's approval."
    if item.edits:
        why = f"The edited arguments do not fit: {item.edits[-1]}. {why}"
    return Approval(
        id=approval_id(item),
        subject=call.tool,
        seq=item.seq,
        arguments=call.arguments,
        digest=digest(call.arguments),
        why=why,
        evidence=progress.evidence(state),
        cost_usd=state.used.cost_usd,
        asked_at=now,
        role=_approver(state, call.tool),
    )


def approval_id(item: CallState) -> str:
    """The id of the request about a call, which is a new one after each edit that the tool did not accept."""
    return _numbered(f"a{item.seq}", len(item.edits))


def _approver(state: RunState, tool: str) -> str:
    """The role that approves a call: the one declared with the tool, else that of its step."""
    policy, step = state.policy(tool), state.step_of(tool)
    return (policy.role if policy else "") or (step.role if step else "")


def refused_turn(state: RunState, why: str, now: datetime) -> Approval:
    """The request about a turn that the model refuses by its policy: ask the model again, or end the run."""
    again = f"-{state.refused_turns}" if state.refused_turns else ""
    return Approval(
        id=f"t{state.turn}{again}",
        kind="refusal",
        subject=f"turn {state.turn}",
        seq=0,
        why=f"The model refuses this turn by its policy ({why}). Approve to ask it again, reject to end the run.",
        evidence=progress.evidence(state),
        cost_usd=state.used.cost_usd,
        asked_at=now,
    )


def asked(state: RunState, question: Question, now: datetime) -> Approval:
    """The request that puts a question of the agent to a person."""
    if question.id not in state.asked:
        state.asked.append(question.id)
    data = (
        question.data if isinstance(question.data, dict) else {} if question.data is None else {"data": question.data}
    )
    return Approval(
        id=_numbered(f"q{state.turn}", state.asked.index(question.id)),
        kind="question",
        subject=question.text if len(question.text) <= SUBJECT else question.text[: SUBJECT - 1] + "…",
        seq=0,
        arguments=data,
        digest=digest([question.text, question.data]),
        why=question.text,
        evidence=progress.evidence(state),
        cost_usd=state.used.cost_usd,
        asked_at=now,
        role=str(data.get("role", "")),
    )


def _numbered(name: str, n: int) -> str:
    return f"{name}-{n + 1}" if n else name


def how_it_ended(state: RunState, item: CallState, now: datetime, before: int = 0) -> Approval | None:
    """The question how this call ended: when that is unknown, an optional step has failed, or its service is down.

    before: how many questions about this call are closed; the new question gets an id of its own.
    """
    call, outcome = item.call, item.outcome
    assert outcome is not None
    step = state.step_of(call.tool)
    match outcome.status:
        case OutcomeStatus.UNKNOWN:
            why = f"{call.tool}: {outcome.reason}. It is not tried again until a person has settled it."
        case OutcomeStatus.FAILED if step and not step.critical:
            why = f"{call.tool} did not work: {outcome.reason or outcome.content}. It is left to a person."
        case OutcomeStatus.DEFERRED if step:
            off = _why_off(state, call.tool)
            why = f"{call.tool} is deferred: {off}. The platform tries it again; settle it if you did it yourself."
        case _:
            return None
    return Approval(
        id=_numbered(f"o{item.seq}", before),
        kind="outcome",
        subject=call.tool,
        seq=item.seq,
        arguments=call.arguments,
        digest=digest(call.arguments),
        why=why,
        evidence=". The call: ".join(part for part in (progress.evidence(state), outcome.known) if part),
        cost_usd=state.used.cost_usd,
        asked_at=now,
        role=step.role if step else "",
        key=f"{state.key_base}/{item.seq}",
        step=step.name if step else "",
        eta=now + timedelta(seconds=step.review_s) if step and step.review_s else None,
        about=outcome.status,
    )


def closed(state: RunState, seq: int) -> int:
    """How many questions about the end of this call were answered or withdrawn."""
    answered = (d.approval for d in state.approvals.decided.values())
    withdrawn = (name.partition("-")[0] for name in state.approvals.withdrawn)
    return sum(a.kind == "outcome" and a.seq == seq for a in answered) + sum(name == f"o{seq}" for name in withdrawn)


def held(state: RunState) -> list[str]:
    """Open questions about critical steps: the run cannot end without their answers."""
    asked = (a for a in state.approvals.open.values() if a.kind == "outcome")
    asked = (a for a in asked if a.about != OutcomeStatus.DEFERRED)  # the platform tries these again
    return [a.id for a in asked if (step := state.step_of(a.subject)) and step.critical]


def answered(state: RunState) -> list[Approval]:
    """Questions with an answer that the ledger has not taken yet."""
    decided = (d.approval for d in state.approvals.decided.values())
    return [a for a in decided if a.kind == "outcome" and a.id not in state.settled]


def outdated(state: RunState, tool: str) -> list[str]:
    """Open questions about a tool that has worked meanwhile."""
    end = state.ends.get(tool)
    if end is None or end.status is not OutcomeStatus.OK:
        return []
    doubts = {each.seq for each in state.doubts}
    asked = (a for a in state.approvals.open.values() if a.kind == "outcome" and a.subject == tool)
    return [a.id for a in asked if a.seq not in doubts]


def deferral(deferred: Deferred) -> Outcome:
    """What the model and the reader hear of a deferred call."""
    content = (
        f"deferred: {deferred.words}. The platform makes the call, and tells you how it ended. "
        f"Do not call {deferred.call.tool} again; go on with what does not need it."
    )
    return Outcome(status=OutcomeStatus.DEFERRED, content=content, reason=deferred.words)


def settle(state: RunState, approval: Approval, decision: ApprovalDecision, outcome: Outcome) -> None:
    """Applies a person's finding to the state. `outcome`: what the ledger has recorded."""
    tool, seq, who = approval.subject, approval.seq, decision.approver
    before = state.ends.get(tool)
    beside = state.resolved(seq)  # `ends` shows another call of the tool
    if outcome.status is OutcomeStatus.OK:
        if not beside:
            state.ended(tool, ToolEnd(status=OutcomeStatus.OK, seq=seq, origin=f"settled by {who}"))
        state.notices.append(f"{who} settled call #{seq} of {tool}: it happened. {outcome.content}")
        state.lasts(tool, seq, f"settled by {who}")
        return
    comment = f": {decision.comment}" if decision.comment else ""
    mine = before is not None and before.status is OutcomeStatus.UNKNOWN and before.seq == seq
    if mine and not beside:
        del state.ends[tool]
    if mine or beside:
        state.notices.append(
            f"{who} settled call #{seq} of {tool}: it did not happen{comment}. Call it again if it is still needed."
        )
    else:
        state.ended(tool, ToolEnd(status=OutcomeStatus.FAILED, seq=seq, detail=f"not done according to {who}{comment}"))
        state.notices.append(f"{who} settled call #{seq} of {tool}: it is not done{comment}.")
    if decision.verdict is Verdict.HAPPENED:  # the ledger already had another finding
        state.notices[-1] += f" ({who} said that it happened; {outcome.content})"


def _why_off(state: RunState, tool: str) -> str:
    deferred = state.deferred_call(tool)
    return deferred.why if deferred else "its service does not answer"
