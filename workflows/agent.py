"""The life of an agent: plan → gate → human → act → … → finish or unwind. One workflow runs every agent.

No I/O, no wall clock: everything that can fail is an activity. What has to survive continue-as-new is in `RunState`
and nowhere else. The coroutines may be dropped whenever no activity is open, and start again from that state.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from temporalio import workflow
from temporalio.common import RawValue, VersioningBehavior
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.workflow import ContinueAsNewVersioningBehavior

from activities.runs import RunRecords
from holdfast.aio import to_the_end
from holdfast.contracts.data import clip
from holdfast.contracts.failures import ErrorType
from holdfast.contracts.people import Approval, DecisionReply, Verdict
from holdfast.contracts.run import AgentInput, Phase, RunEnd, RunOutcome, RunResult, RunStatus
from holdfast.contracts.tool_call import Outcome
from holdfast.contracts.turn import OutcomeStatus
from holdfast.recovery import resets
from workflows import deadline, gate, messages, progress, saga
from workflows.activity_runner import ActivityRunner, why
from workflows.approvals import Approvals
from workflows.completion import judge_turn
from workflows.deferred import DeferredCalls
from workflows.finishing import Finishing
from workflows.lookback import Lookback
from workflows.planning import Planning
from workflows.run import MAX_NOTE, Run
from workflows.start_input import RUN, start
from workflows.state import CallState, Ending
from workflows.tool_calls import ToolCalls
from workflows.webhooks import Webhooks

MAX_ANSWERS = 1_000_000
"""Bytes of all answers of a turn together: the next turn's request has to fit into a Temporal payload (2 MB)."""


# Pinned: a run stays with the build that it began on. Has an effect only where workers are versioned.
@workflow.defn(name="AgentWorkflow", versioning_behavior=VersioningBehavior.PINNED)
class AgentWorkflow:
    @workflow.init
    def __init__(self, *payload: Any) -> None:
        # In the constructor, because a Signal may be handled before `run` begins.
        self._run = run = Run(start(AgentInput, payload, RUN))
        self._activities = ActivityRunner(run)
        run.state.waits = self._activities.waits
        self._webhooks = Webhooks(run)
        self._approvals = Approvals(run, self._webhooks)
        self._tool_calls = ToolCalls(run, self._activities)
        self._deferred = DeferredCalls(run, self._activities, self._approvals, self._tool_calls)
        self._lookback = Lookback(run, self._activities, self._approvals, self._tool_calls, self._deferred)
        self._planning = Planning(run, self._activities, self._approvals, self._lookback)
        self._finishing = Finishing(run, self._approvals, self._deferred, self._lookback)

    # ------------------------------------------------------------ the life of a run

    @workflow.run
    async def run(self, *_: Any) -> RunResult:
        """Takes one `AgentInput`."""
        given, state = self._run.given, self._run.state
        self._run.start_page()
        if given.state is not None:
            self._run.changed()
        ending = await self._live()
        if ending is None:
            await workflow.wait_condition(workflow.all_handlers_finished)
            # No await from here: a Signal handled now would be lost.
            carried = state.model_dump(mode="json", exclude_defaults=True)
            # No replay crosses this boundary and the state is a contract, so a long run changes builds here. Otherwise
            # it would keep the workers of its first build alive forever.
            workflow.continue_as_new(
                given.model_copy(update={"state": carried}),
                initial_versioning_behavior=ContinueAsNewVersioningBehavior.AUTO_UPGRADE,
            )
        result = await to_the_end(self._close(ending))
        await workflow.wait_condition(workflow.all_handlers_finished)
        if ending.outcome is RunOutcome.CANCELLED:
            raise asyncio.CancelledError(ending.reason)
        if ending.outcome is RunOutcome.FAILED:
            raise ApplicationError(ending.reason, result, type=ErrorType.AGENT_FAILED, non_retryable=True)
        return result

    async def _live(self) -> Ending | None:
        """Works until the run ends, or should continue as new (None). Effects in flight are settled by then."""
        run = self._run
        work = asyncio.create_task(self._work())
        watch = asyncio.create_task(deadline.watch(run))
        look = asyncio.create_task(self._lookback.watch())
        self._deferred.resume()
        try:
            await workflow.wait_condition(
                lambda: bool(work.done() or run.ending or self._is_idle() or self._deferred.broken() or look.done())
            )
        except asyncio.CancelledError:
            reason = workflow.cancellation_reason()
            words = f"cancelled: {clip(reason, MAX_NOTE)}" if reason else "cancelled"
            run.ending = Ending(RunOutcome.CANCELLED, words)
        watch.cancel()
        try:
            if broken := self._deferred.broken() or (look.exception() if look.done() else None):
                raise broken
            ending = run.ending or (work.result() if work.done() else None)
        except ActivityError as error:
            # An activity whose failure no code handles, such as `check` or `settle`. The run fails itself, and unwinds.
            ending = run.ending = Ending(RunOutcome.FAILED, f"gave up: {why(error)}")
        rest = [task for task in (work, look, *self._deferred.unfinished()) if not task.done()]
        for task in rest:
            task.cancel()
        if not work.done() or self._activities.open:
            # Tool calls settle first: an effect must not end after its undo began.
            await to_the_end(workflow.wait(rest))
        return run.ending or ending

    async def _work(self) -> Ending | None:
        """Turn after turn: plan, then the calls that were decided, or the end. None: time to continue as new."""
        run, state = self._run, self._run.state
        while run.ending is None:
            if not state.calls and state.final is None:
                if self._is_long() and self._at_rest():
                    return None
                if ending := await self._planning.turn():
                    return ending
            if state.final is not None:
                if ending := await self._finishing.finish(state.final):
                    return ending
            elif state.calls and (ending := await self._carry_out()):
                return ending
        return run.ending

    async def _close(self, ending: Ending) -> RunResult:
        """Undoes what has to be undone, and stores the result where it outlives Temporal's retention."""
        run = self._run
        run.ending = ending
        run.state.calls = []  # the remaining calls waited for a person and never began
        self._approvals.close()
        if ending.outcome.unwinds:
            await saga.unwind(run, self._tool_calls)
        result = run.result = progress.result(run.given, run.state, ending)
        run.enter(Phase.ENDED)
        failed = ending.outcome is RunOutcome.FAILED
        end = RunEnd(
            tenant=run.given.tenant,
            result=result,
            input=run.given.input if failed else None,
            requested_by=run.given.requested_by,
        )
        more = await self._activities.run(RunRecords.record_end, end, summary=f"record: {ending.outcome}")
        if more:  # unknown calls that only the ledger knows
            result = run.result = result.model_copy(update={"pending": [*result.pending, *more]})
        await self._webhooks.ended(result)
        return result

    # ------------------------------------------------------------ gate, human, act

    async def _carry_out(self) -> Ending | None:
        """Takes the calls of a decision to their outcomes, side by side. Returns the ending if they end the run."""
        state = self._run.state
        under_way = (self._one(item) for item in state.calls if item.outcome is None)
        # Collects exceptions: a plain gather would end with the first cancelled child (one that waits for a person)
        # while an effect of another child is still in flight.
        for error in await asyncio.gather(*under_way, return_exceptions=True):
            if error is not None:
                raise error
        share = MAX_ANSWERS // len(state.calls)
        state.answers = [clip(c.outcome.content, share) for c in state.calls if c.outcome]
        statuses = [c.outcome.status for c in state.calls if c.outcome]
        state.statuses = [] if {*statuses} == {OutcomeStatus.OK} else statuses
        ending, state.calls = judge_turn(state), []
        return ending

    async def _one(self, item: CallState) -> None:
        """Takes one call to its outcome."""
        outcome = await self._pass(item)
        if item.edited_by:
            given = json.dumps(item.call.arguments, ensure_ascii=False)
            text = f"[{item.edited_by} changed the arguments to {given}]\n{outcome.content}"
            outcome = outcome.model_copy(update={"content": text})
        item.outcome = outcome
        self._deferred.conclude(item)

    async def _pass(self, item: CallState) -> Outcome:
        """Asks the gate until it lets the call run or has an outcome for it."""
        given, state = self._run.given, self._run.state
        while True:
            match gate.judge(state, given.standing, item, workflow.now()):
                case gate.Proceed():
                    return await self._act(item)
                case gate.Ask(approval):
                    await self._ask(item, approval)
                case gate.Wait():
                    await self._lookback.done()
                case gate.Answered(outcome, key):
                    state.stood.append(key)
                    return outcome
                case gate.Deny(outcome):
                    return outcome

    async def _ask(self, item: CallState, approval: Approval) -> None:
        """Waits for a person's decision, and gives the call the arguments that the person edited."""
        self._approvals.open(approval)
        decision = await self._approvals.answer(approval.id)
        if decision is None or decision.verdict is not Verdict.EDIT:
            return
        checked = await self._tool_calls.check(item, decision.arguments or {})
        if checked.problem:
            item.edits.append(checked.problem)
            self._run.note(f"edit of {decision.approver} ignored: {checked.problem}")
        else:
            item.call = item.call.model_copy(update={"arguments": checked.arguments})
            item.edited_by = decision.approver

    async def _act(self, item: CallState) -> Outcome:
        item.acting = True
        outcome = await self._tool_calls.tool(item.call, item.seq, workflow.now())
        if outcome.wait is None:
            return outcome
        self._run.note(outcome.wait.why)
        return self._deferred.defer(item, outcome.wait)

    # ------------------------------------------------------------ continue-as-new

    def _is_long(self) -> bool:
        """Whether it is time to continue as new."""
        profile = self._run.state.profile
        limit = profile is not None and self._planning.turns_here >= profile.turns_per_execution
        return limit or workflow.info().is_continue_as_new_suggested()

    def _is_idle(self) -> bool:
        """Whether the run only waits for a person or is parked, and its history is long."""
        state = self._run.state
        idle = state.approvals.blocking or state.phase is Phase.PARKED
        return bool(idle) and self._at_rest() and self._is_long()

    def _at_rest(self) -> bool:
        return self._activities.open == 0 and self._webhooks.idle and not self._run.state.look_back_due

    # ------------------------------------------------------------ Signals, Updates and queries

    @workflow.signal(name="decide", description="Answers an approval: approval_id, verdict, approver")
    async def decide(self, *payload: Any) -> None:
        await self._take_decision(*payload)

    @workflow.update(name="decide", description="The same as the Signal, answered with what came of it")
    async def decide_now(self, *payload: Any) -> DecisionReply:
        return await self._take_decision(*payload)

    async def _take_decision(self, *payload: Any) -> DecisionReply:
        await self._approvals.foresee(*payload)
        await asyncio.sleep(0)  # the Signal of a reset by the sweep may have come in the same task
        return await self._run.inbox.take(lambda: self._approvals.decide(*payload))

    @workflow.signal(name="message", description="Sends a message to the run: text, by")
    async def message(self, *payload: Any) -> None:
        await self._run.inbox.take(lambda: messages.take(self._run, payload))

    @workflow.update(name="message", description="The same as the Signal, answered with what comes of it")
    async def message_now(self, *payload: Any) -> DecisionReply:
        return await self._run.inbox.take(lambda: messages.take(self._run, payload))

    @workflow.signal(name=resets.SIGNAL, description="Sent by the sweep: it has reset this run")
    async def was_reset(self, *payload: Any) -> None:
        self._approvals.recalls = resets.told_of(payload) is not None
        await self._approvals.foreseen()
        await asyncio.sleep(0)  # after the decisions that came before it
        await self._run.inbox.take(lambda: self._lookback.was_reset(payload))

    @workflow.signal(dynamic=True, description="Any other name: noted, and nothing else")
    async def other(self, name: str, _: Sequence[RawValue]) -> None:
        """Takes a Signal of any other name. Raw, because Temporal drops what cannot be converted without a trace."""
        unknown = messages.unknown_signal(name, ("decide", "message"), "a run")
        await self._run.inbox.take(lambda: self._run.note(unknown))

    @workflow.query(description="What the run is doing")
    def status(self) -> RunStatus:
        return progress.status(self._run.given, self._run.state, self._run.ending)

    @workflow.query(description="Approvals that wait for a human")
    def approvals(self) -> list[Approval]:
        return list(self._run.state.approvals.open.values())

    @workflow.query(description="The result, or null while the run goes on")
    def result(self) -> RunResult | None:
        return self._run.result
