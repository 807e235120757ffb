"""The work that goes on beside the turns of a run: calls that are deferred while their service is down, and outcomes
that a person settles. Both end with a notice to the model. Their state is in `RunState`, so they survive
continue-as-new.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

from temporalio import workflow

from activities.tools import Tools
from holdfast.aio import to_the_end
from holdfast.contracts.people import Approval, ApprovalDecision, Finding, Verdict
from holdfast.contracts.tool_call import Outcome
from holdfast.contracts.turn import OutcomeStatus, Wait
from workflows import questions
from workflows.activity_runner import ActivityRunner
from workflows.approvals import Approvals
from workflows.run import Run
from workflows.state import CallState, Deferred
from workflows.tool_calls import ToolCalls


class DeferredCalls:
    def __init__(self, run: Run, activities: ActivityRunner, approvals: Approvals, tool_calls: ToolCalls) -> None:
        self._run = run
        self._state = run.state
        self._activities = activities
        self._approvals = approvals
        self._tool_calls = tool_calls
        self._trying: set[int] = set()
        """Deferred calls whose next attempt is in flight."""
        self._answered: set[int] = set()
        """Deferred calls that a person settles: they are not tried again."""
        # A dict keeps the order, a set would not: tasks are cancelled in this order, which orders their commands.
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._broken: BaseException | None = None

    def resume(self) -> None:
        """Resumes what was open when the run continued as new."""
        for deferred in self._state.deferred:
            self._start(self._try_again(deferred))
        asked = [a for a in self._state.approvals.open.values() if a.kind == "outcome"]
        for approval in asked + questions.answered(self._state):
            self._start(self._settle(approval))

    def defer(self, item: CallState, wait: Wait) -> Outcome:
        """Defers a call: it is tried again when its service is back. Returns what the turn hears of it now."""
        deferred = Deferred(call=item.call, seq=item.seq, until=wait.until, since=workflow.now(), why=wait.why)
        self._state.deferred.append(deferred)
        self._start(self._try_again(deferred))
        return questions.deferral(deferred)

    def conclude(self, item: CallState) -> None:
        """Accounts for the outcome of a call, and asks a person if the platform cannot settle it."""
        assert item.outcome is not None
        self._state.account(item)
        self._run.note(*item.outcome.notes)
        for name in questions.outdated(self._state, item.call.tool):
            self._approvals.withdraw(name, f"call #{item.seq} of {item.call.tool} has worked")
        before = questions.closed(self._state, item.seq)
        approval = questions.how_it_ended(self._state, item, workflow.now(), before)
        if approval and not self._state.approvals.asked(approval.id):
            self._approvals.open(approval)
            self._start(self._settle(approval))
        self._run.changed()

    @property
    def open_ends(self) -> bool:
        """Whether a call is deferred, or a question about a critical step is open: the run cannot end before that."""
        state = self._state
        return bool(state.deferred or questions.held(state) or questions.answered(state))

    def broken(self) -> BaseException | None:
        """The exception that a bug raised in one of these tasks. The run has to raise it, or it would wait forever."""
        return self._broken

    def unfinished(self) -> list[asyncio.Task[None]]:
        return [*self._tasks]

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled():
            self._broken = self._broken or task.exception()

    async def _try_again(self, deferred: Deferred) -> None:
        state, call, seq = self._state, deferred.call, deferred.seq
        while True:
            pause = max(deferred.until - workflow.now(), timedelta(milliseconds=100))
            await workflow.sleep(pause, summary=f"#{seq} {call.tool} is deferred")
            if deferred not in state.deferred or seq in self._answered:
                return  # a person has settled the call
            self._trying.add(seq)
            try:
                outcome = await self._tool_calls.tool(call, seq, deferred.since)
            finally:
                self._trying.discard(seq)
            if outcome.wait is None:
                break
            deferred.until, deferred.why = outcome.wait.until, outcome.wait.why
            self._run.changed()
        if deferred not in state.deferred:
            return
        state.deferred.remove(deferred)
        for name in [a.id for a in state.approvals.open.values() if a.kind == "outcome" and a.seq == seq]:
            self._approvals.withdraw(name, f"call #{seq} of {call.tool} was tried again and ended: {outcome.status}")
        state.notices.append(f"Call #{seq} of {call.tool}, deferred before, has ended: {outcome.content}")
        self.conclude(CallState(call=call, seq=seq, outcome=outcome))

    async def _settle(self, approval: Approval) -> None:
        decision = await self._approvals.answer(approval.id)
        if decision is None:
            return
        if approval.about == OutcomeStatus.DEFERRED:
            self._answered.add(approval.seq)
            # An attempt in flight may act: when it has ended, what the person was shown may no longer be true.
            await workflow.wait_condition(lambda: approval.seq not in self._trying)
            await to_the_end(self._settled_for(approval, decision))
        else:
            await to_the_end(self._settled(approval, decision))

    async def _settled_for(self, approval: Approval, decision: ApprovalDecision) -> None:
        """Takes the answer to a question about a deferred call, unless the call has ended meanwhile."""
        deferred = next((each for each in self._state.deferred if each.seq == approval.seq), None)
        if deferred is None:
            self._state.settled.append(approval.id)
            self._run.note(
                f"{decision.approver} answered {approval.id} ({decision.verdict}) while call #{approval.seq} of"
                f" {approval.subject} was tried again. The call has ended, so this answer changes nothing"
            )
            self._run.changed()
            return
        # Closes the key, and writes the row that `settle` needs: the call may never have been sent.
        call, seq = deferred.call, deferred.seq
        known = await self._tool_calls.give_up(call, seq, f"settled by {decision.approver} while it was deferred")
        if known.status is not OutcomeStatus.UNKNOWN or decision.verdict is Verdict.HAPPENED:
            await self._settled(approval, decision)
            return
        # An earlier attempt may have acted. The question did not say so, so the answer does not cover it.
        self._state.settled.append(approval.id)
        self._state.deferred.remove(deferred)
        self._run.note(
            f"{decision.approver} says of {approval.id} that it did not happen, but an earlier attempt may have acted"
        )
        self.conclude(CallState(call=call, seq=seq, outcome=known))

    async def _settled(self, approval: Approval, decision: ApprovalDecision) -> None:
        """Records how a call ended according to a person, and tells the model."""
        finding = Finding(
            key=approval.key,
            happened=decision.verdict is Verdict.HAPPENED,
            result=decision.comment if decision.result is None else decision.result,
            by=decision.approver,
            comment=decision.comment,
        )
        outcome = await self._activities.run(Tools.settle, finding, summary=f"{approval.id}: {decision.verdict}")
        self._state.deferred = [each for each in self._state.deferred if each.seq != approval.seq]
        self._state.settled.append(approval.id)
        questions.settle(self._state, approval, decision, outcome)
        self._run.changed()
