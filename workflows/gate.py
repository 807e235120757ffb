"""The checks before a call may run: effects that still stand from an earlier run, unknown outcomes, and approval."""

from __future__ import annotations

from collections.abc import Callable

from temporalio import workflow

from holdfast.contracts.people import ApprovalDecision, Verdict
from holdfast.contracts.profile import Effect, ToolPolicy
from holdfast.contracts.run import Standing
from holdfast.contracts.tool_call import Outcome
from holdfast.contracts.turn import OutcomeStatus, ToolCall
from workflows import questions
from workflows.approvals import Approvals
from workflows.lookback import void
from workflows.state import CallState, RunState
from workflows.tool_calls import ToolCalls


class Gate:
    """The gate of one run. The place for policy and budget checks too."""

    def __init__(
        self,
        state: RunState,
        standing: list[Standing],
        approvals: Approvals,
        tool_calls: ToolCalls,
        note: Callable[[str], None],
    ) -> None:
        self._state = state
        self._all_standing = standing
        self._approvals = approvals
        self._tool_calls = tool_calls
        self._note = note

    async def outcome(self, item: CallState) -> Outcome | None:
        """The outcome of a call that must not run; None when it may run, perhaps with edited arguments."""
        return void(self._state, item) or self._standing(item.call) or await self._pass(item)

    def _standing(self, call: ToolCall) -> Outcome | None:
        """The result of an earlier call whose effect still stands: it answers this call, so nothing is done twice."""
        for each in (*self._all_standing, *self._state.standing):
            if each.tool == call.tool and each.key not in self._state.stood:
                self._state.stood.append(each.key)
                return Outcome(content=each.content, origin=f"done before, under key {each.key}")
        return None

    async def _pass(self, item: CallState) -> Outcome | None:
        call, policy = item.call, self._state.policy(item.call.tool)
        if policy is None:
            text = f"there is no tool named {call.tool!r} in this run: it came with a later version of the agent"
            return Outcome(status=OutcomeStatus.ERROR, content=text)
        refused = self._refused(call, policy)
        if policy.approval and (not refused or self._approvals.asked(f"a{item.seq}")):
            if rejected := await self._ask(item):
                return rejected
            refused = self._refused(call, policy)  # another call of the tool may have ended meanwhile
        return refused

    async def _ask(self, item: CallState) -> Outcome | None:
        while True:
            approval = questions.may_run(self._state, item, workflow.now())
            self._approvals.open(approval)
            decision = await self._approvals.answer(approval.id)
            if decision is None:
                return void(self._state, item)
            match decision.verdict:
                case Verdict.REJECT:
                    text = f"rejected by {decision.approver}: {decision.comment}"
                    return Outcome(status=OutcomeStatus.REJECTED, content=text)
                case Verdict.EDIT if not await self._edit(item, decision):
                    continue
                case _:
                    return None

    async def _edit(self, item: CallState, decision: ApprovalDecision) -> bool:
        """Gives the call the edited arguments, if the tool takes them."""
        checked = await self._tool_calls.check(item, decision.arguments or {})
        if checked.problem:
            item.edits.append(checked.problem)
            self._note(f"edit of {decision.approver} ignored: {checked.problem}")
            return False
        item.call = item.call.model_copy(update={"arguments": checked.arguments})
        item.edited_by = decision.approver
        return True

    def _refused(self, call: ToolCall, policy: ToolPolicy) -> Outcome | None:
        """Refuses a call while another call of its tool is deferred; one with an effect also while another is unknown.

        Its idempotency key is new, so it could do the same thing twice.
        """
        if deferred := self._state.put_off(call.tool):
            return Outcome(status=OutcomeStatus.ERROR, content=f"refused: {questions.deferral(deferred).content}")
        unknown = self._state.unknown(call.tool)
        if not unknown or policy.effect is Effect.READ:
            return None
        text = f"refused: the outcome of call #{unknown} of {call.tool} is unknown, and a person has to settle it first"
        return Outcome(status=OutcomeStatus.ERROR, content=text)
