"""The gate: whether a call of a decision may run now. It decides from the run's state and changes nothing.

The workflow asks it before each call, and again after everything that it had to wait for. A check of policy, budget or
a halt belongs here, and answers with the same types.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from holdfast.contracts.people import Approval, Verdict
from holdfast.contracts.profile import Effect, ToolPolicy
from holdfast.contracts.run import Standing
from holdfast.contracts.tool_call import Outcome
from holdfast.contracts.turn import OutcomeStatus, ToolCall
from workflows import questions
from workflows.state import CallState, RunState


@dataclass(frozen=True)
class Proceed:
    """The call may run."""


@dataclass(frozen=True)
class Ask:
    """A person decides whether the call may run."""

    approval: Approval


@dataclass(frozen=True)
class Deny:
    """The call must not run. The model gets this outcome."""

    outcome: Outcome


@dataclass(frozen=True)
class Wait:
    """Not known yet: the gate is asked again once the run has looked back."""


@dataclass(frozen=True)
class Answered:
    """The effect of an earlier call still stands. Its result answers this call, so nothing is done twice."""

    outcome: Outcome
    key: str
    """Idempotency key of the earlier call. It answers one call only."""


Decision = Proceed | Ask | Deny | Wait | Answered


def judge(state: RunState, standing: list[Standing], item: CallState, now: datetime) -> Decision:
    """standing: the effects of earlier runs that the run was started with."""
    if state.look_back_due:
        return Wait()
    if outcome := void(state, item):
        return Deny(outcome)
    call, asked = item.call, state.approvals.asked(f"a{item.seq}")
    # Not for a call that a person was asked about: it goes out under its own key, and the ledger has its result.
    if not asked and (effect := _stands(state, standing, item)):
        return Answered(Outcome(content=effect.content, origin=f"done before, under key {effect.key}"), effect.key)
    policy = state.policy(call.tool)
    if policy is None:
        text = f"there is no tool named {call.tool!r} in this run: it came with a later version of the agent"
        return Deny(Outcome(status=OutcomeStatus.ERROR, content=text))
    refused = _refused(state, call, policy)
    if policy.approval and (refused is None or asked):
        decision = _approved(state, item, now)
        if not isinstance(decision, Proceed):
            return decision
    return refused or Proceed()


def _stands(state: RunState, standing: list[Standing], item: CallState) -> Standing | None:
    """The effect that answers this call: its own if that stands, else one that belongs to no call of this turn."""
    own, turn = state.key_of(item.seq), {state.key_of(each.seq) for each in state.calls}
    left = [each for each in (*standing, *state.standing) if each.key not in state.stood]
    left = [each for each in left if each.tool == item.call.tool and (each.key == own or each.key not in turn)]
    return min(left, key=lambda each: each.key != own, default=None)


def _approved(state: RunState, item: CallState, now: datetime) -> Decision:
    approval = questions.may_run(state, item, now)
    decided = state.approvals.decided.get(approval.id)
    match decided.decision if decided else None:
        case None:
            return Ask(approval)
        case decision if decision.verdict is Verdict.REJECT:
            text = f"rejected by {decision.approver}: {decision.comment}"
            return Deny(Outcome(status=OutcomeStatus.REJECTED, content=text))
        case decision if decision.verdict is Verdict.EDIT and not item.edited_by:
            return Ask(approval)  # the tool has not accepted the edited arguments yet
        case _:
            return Proceed()


def _refused(state: RunState, call: ToolCall, policy: ToolPolicy) -> Deny | None:
    """Denies a call while another call of its tool is deferred; one with an effect also while another is unknown.

    Its idempotency key is new, so it could do the same thing twice.
    """
    if deferred := state.deferred_call(call.tool):
        content = f"refused: {questions.deferral(deferred).content}"
        return Deny(Outcome(status=OutcomeStatus.ERROR, content=content))
    unknown = state.unknown(call.tool)
    if not unknown or policy.effect is Effect.READ:
        return None
    text = f"refused: the outcome of call #{unknown} of {call.tool} is unknown, and a person has to settle it first"
    return Deny(Outcome(status=OutcomeStatus.ERROR, content=text))


def void(state: RunState, item: CallState) -> Outcome | None:
    """The outcome of a call that was decided before the run learned what no longer stands; None when it may run."""
    if not state.void_turn or state.void_turn != state.turn or item.acting:
        return None
    return not_done("what was done before was undone while this run was stopped, so decide again")


def not_done(why: str) -> Outcome:
    return Outcome(status=OutcomeStatus.ERROR, content=f"not done: {why}. Call again what is still needed.")
