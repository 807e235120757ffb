"""The life of an agent: plan → gate → human → act → … → finish or unwind. One workflow runs every agent.

No I/O, no wall clock: everything that can fail is an activity. What has to survive continue-as-new is in `RunState`
and nowhere else; the coroutines can be dropped at any moment when no activity is open and started again from it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError, is_cancelled_exception

with workflow.unsafe.imports_passed_through():
    from holdfast.contracts import (
        AgentInput,
        Approval,
        DecisionReply,
        Effect,
        Note,
        Outcome,
        OutcomeStatus,
        Phase,
        PlanRequest,
        PlanResult,
        RunEnd,
        RunOutcome,
        RunResult,
        RunStatus,
        StepStatus,
        ToolRequest,
        UndoOutcome,
        UndoRecord,
        UndoStatus,
        Verdict,
        Wait,
        digest,
    )
    from holdfast.temporal import AGENT, STAGE, STATUS, TENANT
    from workflows import progress
    from workflows.approvals import Approvals
    from workflows.saga import unwind
    from workflows.state import CallState, RunState

HEARTBEAT = timedelta(seconds=3)
"""A dead worker is noticed after this long. Activities beat four times as often (`holdfast.reliability.heartbeat`)."""
# Attempts are unlimited: real failures are counted by the ledger and carry their own delay. What this policy paces is
# being tried again after a crash, which is no reason to wait.
RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=500), backoff_coefficient=1.0)
GRACE_S = 30.0
"""Seconds that an activity gets beyond the limit it enforces itself."""
PLAN_S = 450.0
"""Three model calls of 120 s each, and grace."""
MAX_REPEATS = 3
MAX_REFUSALS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Ending:
    outcome: RunOutcome
    reason: str = ""
    summary: str = ""


@workflow.defn(name="AgentWorkflow")
class AgentWorkflow:
    @workflow.init
    def __init__(self, given: AgentInput) -> None:
        info = workflow.info()
        # In the constructor, because a Signal may be handled before `run` begins.
        self._given = given
        self._state = (
            RunState.model_validate(given.state)
            if given.state is not None
            # Carried as data: stable over retries, continue-as-new and Reset, and new when the id is used again.
            else RunState(key_base=f"{info.workflow_id}/{info.first_execution_run_id}", started=info.start_time)
        )
        self._approvals = Approvals(self._state.approvals, self._note, self._changed)
        self._ending: Ending | None = None
        self._result: RunResult | None = None
        self._open_activities = 0
        self._turns_here = 0
        self._shown: tuple[str, str] = ("", "")

    # ------------------------------------------------------------ the life of a run

    @workflow.run
    async def run(self, given: AgentInput) -> RunResult:
        ending = await self._live()
        if ending is None:
            await workflow.wait_condition(workflow.all_handlers_finished)
            carried = self._state.model_dump(mode="json", exclude_defaults=True)
            workflow.continue_as_new(given.model_copy(update={"state": carried}))
        self._ending = ending
        self._approvals.close()
        if ending.outcome.unwinds and self._state.saga:
            self._phase(Phase.COMPENSATING)
            await unwind(self._state.saga, self._undo, self._changed)
        self._result = self._sum_up(ending)
        self._phase(Phase.ENDED)
        end = RunEnd(workflow_id=workflow.info().workflow_id, tenant=given.tenant, result=self._result)
        await self._activity("record_end", end, type(None), GRACE_S, f"record: {ending.outcome}")
        await workflow.wait_condition(workflow.all_handlers_finished)
        if ending.outcome is RunOutcome.CANCELLED:
            raise asyncio.CancelledError(ending.reason)
        if ending.outcome is RunOutcome.FAILED:
            raise ApplicationError(ending.reason, self._result, type="agent_failed", non_retryable=True)
        return self._result

    async def _live(self) -> Ending | None:
        """Works until the run ends, or should continue as new (None). Effects in flight are settled by then."""
        work = asyncio.create_task(self._work())
        watch = asyncio.create_task(self._watch_deadline())
        try:
            await workflow.wait_condition(lambda: work.done() or self._ending is not None or self._continues_idle())
        except asyncio.CancelledError:
            reason = workflow.cancellation_reason()
            self._ending = Ending(RunOutcome.CANCELLED, "cancelled" + (f": {reason}" if reason else ""))
        watch.cancel()
        if work.done():
            return self._ending or work.result()
        work.cancel()
        # Tool activities settle first (WAIT_CANCELLATION_COMPLETED): an effect must not end after its undo began.
        await asyncio.wait([work])
        return self._ending

    async def _work(self) -> Ending | None:
        state = self._state
        while self._ending is None:
            if not state.calls:
                if self._is_long():
                    return None
                if ending := await self._plan():
                    return ending
            if state.calls:
                await asyncio.gather(*(self._one(call) for call in state.calls if call.outcome is None))
                if ending := self._close_turn():
                    return ending
        return self._ending

    # ------------------------------------------------------------ plan

    async def _plan(self) -> Ending | None:
        """One turn. Sets the calls that it decided, or judges the final words."""
        state = self._state
        if not state.planning:
            if state.profile and state.turn >= state.profile.max_turns:
                return Ending(RunOutcome.FAILED, f"max turns: {state.turn} turns and not finished")
            state.turn += 1
            state.planning = True
        request = PlanRequest(
            agent=self._given.agent,
            key_base=state.key_base,
            turn=state.turn,
            base=state.base,
            inbox=state.inbox,
            input=self._given.input if state.turn == 1 else None,
        )
        self._phase(Phase.RUNNING)
        try:
            planned = await self._patiently("plan", request, PlanResult, PLAN_S, f"turn {state.turn}")
        except ActivityError as error:
            return Ending(RunOutcome.FAILED, f"turn {state.turn}: {_why(error)}")
        assert planned.decision is not None
        state.planning, state.inbox = False, []
        self._turns_here += 1
        state.base, state.model = planned.checkpoint, planned.model
        state.usage += planned.usage
        if planned.profile:
            state.profile = planned.profile
        if planned.decision.final is not None:
            return self._finish(planned.decision.final)
        # Keys are allotted in decision order before anything is awaited, so a replay allots the same.
        state.calls = [CallState(call=call, seq=state.seq + n) for n, call in enumerate(planned.decision.calls, 1)]
        state.seq += len(state.calls)
        return None

    def _finish(self, final: str) -> Ending | None:
        """Final words end the run only when every critical step has an outcome; else the model is told."""
        state, steps = self._state, self._state.steps()
        if rejected := [s.name for s in steps if s.status is StepStatus.REJECTED]:
            comments = [d.decision.comment for d in state.approvals.decided.values() if d.decision.comment]
            why = f"rejected by the human at {', '.join(rejected)}: {'; '.join(comments)}"
            return Ending(RunOutcome.REJECTED, why, final)
        if missing := [s.name for s in steps if s.critical and s.status is StepStatus.TODO]:
            state.refusals += 1
            names = ", ".join(missing)
            if state.refusals >= MAX_REFUSALS:
                return Ending(RunOutcome.FAILED, f"critical step gone: {names} never got an outcome", final)
            self._note(f"finishing refused: {names} without an outcome")
            text = f"Finishing is refused: these critical steps have no outcome yet: {names}. Do them, then finish."
            state.inbox = [Note(text=text)]
            return None
        if state.pending():
            return Ending(RunOutcome.PARTIAL, progress.line(steps, ""), final)
        return Ending(RunOutcome.COMPLETED, "", final)

    # ------------------------------------------------------------ gate, human, act

    async def _one(self, item: CallState) -> None:
        """Takes one call of a decision to its outcome."""
        item.outcome = await self._gated(item)
        self._state.account(item)
        self._changed()

    async def _gated(self, item: CallState) -> Outcome:
        call = item.call
        if (unknown := self._state.unknown(call.tool)) and call.effect is not Effect.READ:
            # A new call has a new key: it would be a blind second effect.
            text = f"refused: the outcome of call #{unknown} of {call.tool} is unknown and waits for a person"
            return Outcome(status=OutcomeStatus.ERROR, content=text)
        if call.approval:
            decision = await self._approvals.ask(self._approval(item))
            if decision.verdict is Verdict.REJECT:
                text = f"rejected by {decision.approver}: {decision.comment}"
                return Outcome(status=OutcomeStatus.REJECTED, content=text)
            self._phase(Phase.RUNNING)
        if call.undo:
            self._state.register_undo(item)
        return await self._act(item)

    async def _act(self, item: CallState) -> Outcome:
        call = item.call
        request = ToolRequest(
            agent=self._given.agent,
            key_base=self._state.key_base,
            seq=item.seq,
            tool=call.tool,
            version=call.version,
            arguments=call.arguments,
        )
        summary = f"#{item.seq} {call.tool}" + (f" ({call.service})" if call.service else "")
        try:
            return await self._patiently("tool", request, Outcome, call.timeout_s, summary, call.deadline_s)
        except ActivityError as error:
            # Its deadline passed, or it was cancelled before it could say how it ended.
            if is_cancelled_exception(error) or call.effect is Effect.READ:
                return Outcome(status=OutcomeStatus.FAILED, content=f"gave up: {_why(error)}")
            return Outcome(status=OutcomeStatus.UNKNOWN, content=f"outcome unknown: {_why(error)}")

    def _approval(self, item: CallState) -> Approval:
        state, call = self._state, item.call
        return Approval(
            id=f"a{item.seq}",
            subject=call.tool,
            seq=item.seq,
            arguments=call.arguments,
            digest=digest(call.arguments),
            why=f"Every call of {call.tool} needs a person's yes.",
            evidence=progress.line(state.steps(), ""),
            cost_usd=state.usage.cost_usd,
            asked_at=workflow.now(),
        )

    def _close_turn(self) -> Ending | None:
        """Hands the outcomes to the next turn, unless the run cannot go on."""
        state = self._state
        told = [Note(call=c.call.id, text=c.outcome.content) for c in state.calls if c.outcome]
        same = digest([[c.call.tool, c.call.arguments, c.outcome and c.outcome.content] for c in state.calls])
        state.repeats = state.repeats + 1 if same == state.last_turn else 0
        state.last_turn, state.inbox, state.calls = same, told, []
        if gone := next((s for s in state.steps() if s.critical and s.status is StepStatus.FAILED), None):
            return Ending(RunOutcome.FAILED, f"critical step gone: {gone.name}: {gone.detail}")
        if state.repeats >= MAX_REPEATS:
            reason = f"loop without progress: the same calls with the same outcomes {MAX_REPEATS + 1} times"
            return Ending(RunOutcome.FAILED, reason)
        return None

    async def _undo(self, record: UndoRecord) -> UndoOutcome:
        request = ToolRequest(
            agent=self._given.agent,
            key_base=self._state.key_base,
            seq=record.seq,
            tool=record.tool,
            version=record.version,
            arguments=record.arguments,
        )
        return await self._patiently("undo", request, UndoOutcome, GRACE_S, f"undo #{record.seq} {record.tool}", 3600.0)

    # ------------------------------------------------------------ time

    async def _watch_deadline(self) -> None:
        """Ends the run when its time is used up. The clock stands still while a human is asked."""
        approvals = self._state.approvals
        while self._ending is None:
            await workflow.wait_condition(lambda: self._state.profile is not None and approvals.asked_since is None)
            assert self._state.profile is not None
            used = (workflow.now() - self._state.started).total_seconds() - approvals.waited_s
            left = self._state.profile.deadline_s - used
            if left <= 0:
                self._ending = Ending(RunOutcome.FAILED, f"deadline: {used:.0f} s are used up")
                return
            try:
                await workflow.wait_condition(lambda: approvals.asked_since is not None, timeout=left)
            except TimeoutError:
                continue

    def _is_long(self) -> bool:
        """Time to continue as new."""
        profile = self._state.profile
        limit = profile is not None and self._turns_here >= profile.turns_per_execution
        return limit or workflow.info().is_continue_as_new_suggested()

    def _continues_idle(self) -> bool:
        """Nothing is open but a human's answer or a park, and the history is long."""
        idle = self._state.approvals.open or self._state.phase is Phase.PARKED
        return bool(idle) and self._open_activities == 0 and self._is_long()

    # ------------------------------------------------------------ activities

    async def _patiently(
        self,
        name: str,
        request: Any,
        result_type: type[T],
        timeout_s: float,
        summary: str,
        deadline_s: float | None = None,
    ) -> T:
        """Runs an activity that may answer "not before T": the workflow sleeps on a durable timer and asks again."""
        while True:
            outcome = await self._activity(name, request, result_type, timeout_s, summary, deadline_s)
            wait: Wait | None = getattr(outcome, "wait", None)
            if wait is None:
                return outcome
            self._note(wait.why)
            self._phase(Phase.PARKED)
            await workflow.sleep(max(wait.until - workflow.now(), timedelta(milliseconds=100)))
            self._phase(Phase.RUNNING)

    async def _activity(
        self,
        name: str,
        request: Any,
        result_type: type[T],
        timeout_s: float,
        summary: str,
        deadline_s: float | None = None,
    ) -> T:
        self._open_activities += 1
        try:
            return await workflow.execute_activity(
                name,
                request,
                result_type=result_type,
                start_to_close_timeout=timedelta(seconds=timeout_s + GRACE_S),
                schedule_to_close_timeout=timedelta(seconds=deadline_s) if deadline_s else None,
                heartbeat_timeout=HEARTBEAT,
                retry_policy=RETRY,
                summary=summary,
                cancellation_type=(
                    workflow.ActivityCancellationType.TRY_CANCEL
                    if name == "plan"
                    else workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED
                ),
            )
        finally:
            self._open_activities -= 1

    # ------------------------------------------------------------ what the world sees

    @workflow.signal(name="decide", description="Answers an approval: approval_id, verdict, approver")
    def decide(self, *payload: Any) -> None:
        self._approvals.decide(*payload)

    @workflow.update(name="decide", description="The same as the Signal, answered with what became of it")
    def decide_now(self, *payload: Any) -> DecisionReply:
        return self._approvals.decide(*payload)

    @workflow.query(description="What the run is doing")
    def status(self) -> RunStatus:
        state, steps = self._state, self._state.steps()
        return RunStatus(
            agent=self._given.agent,
            phase=state.phase,
            line=self._headline(),
            percent=progress.percent(steps),
            steps=steps,
            approvals=list(state.approvals.open.values()),
            notes=state.notes,
            turn=state.turn,
            calls=state.seq,
            usage=state.usage,
            model=state.model,
            key_base=state.key_base,
            trace_id=self._given.trace_id,
            undone=[u for u in state.saga if u.status is not UndoStatus.REGISTERED],
            outcome=self._ending.outcome if self._ending else None,
        )

    @workflow.query(description="Approvals that wait for a human")
    def approvals(self) -> list[Approval]:
        return list(self._state.approvals.open.values())

    @workflow.query(description="The result, or null while the run goes on")
    def result(self) -> RunResult | None:
        return self._result

    def _note(self, text: str) -> None:
        notes = self._state.notes
        if not notes or not notes[-1].endswith(text):
            notes.append(f"{workflow.now():%Y-%m-%d %H:%M:%S} {text}")
            del notes[:-50]

    def _phase(self, phase: Phase) -> None:
        self._state.phase = phase
        self._changed()

    def _changed(self) -> None:
        """Brings the Web UI's page and the search attributes up to date."""
        state = self._state
        waiting = state.phase is Phase.RUNNING and state.approvals.open
        if waiting or (state.phase is Phase.WAITING_HUMAN and not state.approvals.open):
            state.phase = Phase.WAITING_HUMAN if waiting else Phase.RUNNING
        workflow.set_current_details(
            progress.details(
                workflow.info().workflow_id,
                self._headline(),
                state.steps(),
                state.approvals.open.values(),
                [u for u in state.saga if u.status is not UndoStatus.REGISTERED],
                state.notes,
                state.usage,
                state.model,
            )
        )
        shown = (state.phase.value, state.stage())
        if shown != self._shown:
            self._shown = shown
            given = self._given
            workflow.upsert_search_attributes(
                [
                    AGENT.value_set(given.agent),
                    TENANT.value_set(given.tenant),
                    STATUS.value_set(shown[0]),
                    STAGE.value_set(shown[1]),
                ]
            )

    def _headline(self) -> str:
        ending = self._ending
        return progress.line(
            self._state.steps(), f"{ending.outcome}: {ending.reason}" if ending else self._state.doing()
        )

    def _sum_up(self, ending: Ending) -> RunResult:
        state = self._state
        return RunResult(
            outcome=ending.outcome,
            summary=ending.summary,
            reason=ending.reason,
            agent=self._given.agent,
            key_base=state.key_base,
            steps=state.steps(),
            pending=state.pending(),
            undone=state.saga if ending.outcome.unwinds else [],
            usage=state.usage,
            model=state.model,
            turns=state.turn,
            calls=state.seq,
            failures=state.failures,
            human_wait_s=state.approvals.waited_s,
            decisions=list(state.approvals.decided.values()),
            trace_id=self._given.trace_id,
        )


def _why(error: ActivityError) -> str:
    cause = error.cause
    return str(getattr(cause, "message", None) or cause or error)
