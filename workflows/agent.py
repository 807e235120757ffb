"""The life of an agent: plan → gate → human → act → … → finish or unwind. One workflow runs every agent.

No I/O, no wall clock: everything that can fail is an activity. What has to survive continue-as-new is in `RunState`
and nowhere else; the coroutines may be dropped whenever no activity is open, and start again from it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from holdfast.aio import to_the_end
    from holdfast.contracts import (
        AgentInput,
        Approval,
        DecisionReply,
        Effect,
        Outcome,
        OutcomeStatus,
        Phase,
        PlanRequest,
        PlanResult,
        RunEnd,
        RunOutcome,
        RunResult,
        RunStatus,
        ToolCall,
        ToolPolicy,
        ToolRequest,
        UndoOutcome,
        UndoRecord,
        Verdict,
        Wait,
        clip,
        digest,
        key_base,
    )
    from holdfast.reliability.errors import ErrorType
    from workflows import progress
    from workflows.approvals import Approvals
    from workflows.calls import UNDO_DEADLINE_S, Calls, why
    from workflows.judgement import judge_final, judge_turn, out_of_turns
    from workflows.saga import unwind
    from workflows.state import CallState, Ending, RunState

PLAN_S = 420.0
"""Three model calls of up to 130 s (`Settings.model_total_s`), and what lies between."""
MAX_ANSWERS = 1_000_000
"""Bytes of all answers of a turn together: the next turn's request has to fit into a Temporal payload (2 MB)."""


@workflow.defn(name="AgentWorkflow")
class AgentWorkflow:
    @workflow.init
    def __init__(self, given: AgentInput) -> None:
        # In the constructor, because a Signal may be handled before `run` begins.
        info = workflow.info()
        self._given = given
        self._state = (
            RunState.model_validate(given.state)
            if given.state is not None
            # Carried as data: stable over retries, continue-as-new and Reset, and new when the id is used again.
            else RunState(key_base=key_base(info.workflow_id, info.first_execution_run_id), started=info.start_time)
        )
        self._approvals = Approvals(self._state.approvals, self._note, self._changed)
        self._calls = Calls(self._parked)
        self._display = progress.Display(given)
        self._ending: Ending | None = None
        self._result: RunResult | None = None
        self._turns_here = 0
        self._relative_base = self._state.key_base.removeprefix(info.workflow_id)

    # ------------------------------------------------------------ the life of a run

    @workflow.run
    async def run(self, given: AgentInput) -> RunResult:
        if given.state is not None:
            self._changed()
        ending = await self._live()
        if ending is None:
            await workflow.wait_condition(workflow.all_handlers_finished)
            # No await from here: a Signal handled now would be lost.
            carried = self._state.model_dump(mode="json", exclude_defaults=True)
            workflow.continue_as_new(given.model_copy(update={"state": carried}))
        result = await to_the_end(self._close(ending))
        await workflow.wait_condition(workflow.all_handlers_finished)
        if ending.outcome is RunOutcome.CANCELLED:
            raise asyncio.CancelledError(ending.reason)
        if ending.outcome is RunOutcome.FAILED:
            raise ApplicationError(ending.reason, result, type=ErrorType.AGENT_FAILED, non_retryable=True)
        return result

    async def _live(self) -> Ending | None:
        """Works until the run ends, or should continue as new (None). Effects in flight are settled by then."""
        work = asyncio.create_task(self._work())
        watch = asyncio.create_task(self._watch_deadline())
        try:
            await workflow.wait_condition(lambda: work.done() or self._ending is not None or self._continues_idle())
        except asyncio.CancelledError:
            reason = workflow.cancellation_reason()
            self._ending = Ending(RunOutcome.CANCELLED, f"cancelled: {reason}" if reason else "cancelled")
        watch.cancel()
        if work.done():
            return self._ending or work.result()
        work.cancel()
        # Tool calls settle first: an effect must not end after its undo began.
        await to_the_end(workflow.wait([work]))
        return self._ending

    async def _work(self) -> Ending | None:
        state = self._state
        while self._ending is None:
            if not state.calls:
                if self._is_long():
                    return None
                if ending := await self._plan():
                    return ending
            under_way = (self._one(item) for item in state.calls if item.outcome is None)
            # Collecting exceptions, because a plain gather ends with the first child that is cancelled (one that waits
            # for a human), while an effect of another is still in flight.
            for error in await asyncio.gather(*under_way, return_exceptions=True):
                if error is not None:
                    raise error
            if state.calls:
                share = MAX_ANSWERS // len(state.calls)
                state.answers = [clip(c.outcome.content, share) for c in state.calls if c.outcome]
                ending, state.calls = judge_turn(state), []
                if ending:
                    return ending
        return self._ending

    async def _close(self, ending: Ending) -> RunResult:
        """Undoes what has to be undone and keeps the result where it outlives Temporal's retention."""
        self._ending = ending
        self._state.calls = []  # what is left of them waited for a human and never began
        self._approvals.close()
        if ending.outcome.unwinds and self._state.saga:
            self._phase(Phase.COMPENSATING)
            await unwind(self._state.saga, self._undo, self._changed)
        result = self._result = progress.result(self._given, self._state, ending)
        self._phase(Phase.ENDED)
        end = RunEnd(tenant=self._given.tenant, result=result)
        await self._calls.run("record_end", end, type(None), summary=f"record: {ending.outcome}")
        return result

    # ------------------------------------------------------------ plan

    async def _plan(self) -> Ending | None:
        """One turn. Sets the calls that it decided, or judges the final words."""
        state = self._state
        if not state.planning:
            if ending := out_of_turns(state):
                return ending
            state.turn += 1
            state.planning = True
        request = PlanRequest(
            agent=self._given.agent,
            key_base=self._relative_base,
            turn=state.turn,
            base=state.base,
            answers=state.answers,
            notices=state.notices,
            input=self._given.input if state.turn == 1 else None,
        )
        self._phase(Phase.RUNNING)
        try:
            planned = await self._calls.run(
                "plan", request, PlanResult, summary=f"turn {state.turn}", timeout_s=PLAN_S, settle=False
            )
        except ActivityError as error:
            return Ending(RunOutcome.FAILED, f"turn {state.turn}: {why(error)}")
        self._turns_here += 1
        state.planning, state.answers, state.notices = False, [], []
        state.base, state.model = planned.checkpoint, planned.model or state.model
        state.usage += planned.usage
        state.profile = planned.profile or state.profile
        if planned.final is not None:
            verdict = judge_final(state, planned.final)
            if isinstance(verdict, Ending):
                return verdict
            state.notices = [verdict]
            self._note(verdict)
            return None
        # Keys are allotted in decision order before anything is awaited, so a replay allots the same.
        state.calls = [CallState(call=call, seq=state.seq + n) for n, call in enumerate(planned.calls, 1)]
        state.seq += len(state.calls)
        return None

    # ------------------------------------------------------------ gate, human, act

    async def _one(self, item: CallState) -> None:
        """Takes one call of a decision to its outcome."""
        item.outcome = await self._gate(item) or await self._act(item)
        self._state.account(item)
        self._changed()

    async def _gate(self, item: CallState) -> Outcome | None:
        """The outcome of a call that must not run, or None when it may. Policy and budget will ask here as well."""
        call, policy = item.call, self._state.policy(item.call.tool)
        if policy is None:
            text = f"there is no tool named {call.tool!r} in this run: it came with a later version of the agent"
            return Outcome(status=OutcomeStatus.ERROR, content=text)
        refused = self._refused(call, policy)
        if policy.approval and (not refused or self._approvals.asked(_approval_id(item))):
            decision = await self._approvals.ask(self._approval(item))
            if decision.verdict is Verdict.REJECT:
                text = f"rejected by {decision.approver}: {decision.comment}"
                return Outcome(status=OutcomeStatus.REJECTED, content=text)
            refused = self._refused(call, policy)  # another call of the tool may have ended meanwhile
        return refused

    def _refused(self, call: ToolCall, policy: ToolPolicy) -> Outcome | None:
        """A call with an effect while another of its tool is unknown: its key is new, so it would be blind."""
        unknown = self._state.unknown(call.tool)
        if not unknown or policy.effect is Effect.READ:
            return None
        text = f"refused: the outcome of call #{unknown} of {call.tool} is unknown and waits for a person"
        return Outcome(status=OutcomeStatus.ERROR, content=text)

    async def _act(self, item: CallState) -> Outcome:
        call, policy = item.call, self._state.policy(item.call.tool)
        assert policy is not None, "the gate lets no other call pass"
        if policy.undo:
            self._state.register_undo(item)
        try:
            return await self._calls.run(
                "tool",
                self._request(item.seq, call.tool, call.version, call.arguments),
                Outcome,
                summary=f"#{item.seq} {call.tool} ({policy.service})",
                # An attempt of a `probe` tool may ask first and then act, each within the tool's timeout.
                timeout_s=policy.timeout_s * (2 if policy.effect is Effect.PROBE else 1),
                deadline_s=policy.deadline_s,
            )
        except ActivityError as error:
            # Its deadline passed, or it was cancelled before it could say how it ended.
            if policy.effect is Effect.READ:
                return Outcome(status=OutcomeStatus.FAILED, content=f"gave up: {why(error)}")
            return Outcome(status=OutcomeStatus.UNKNOWN, content=f"outcome unknown, gave up: {why(error)}")

    async def _undo(self, record: UndoRecord) -> UndoOutcome:
        request = self._request(record.seq, record.tool, record.version, record.arguments)
        summary = f"undo #{record.seq} {record.tool}"
        policy = self._state.policy(record.tool) or ToolPolicy()
        return await self._calls.run(
            "undo", request, UndoOutcome, summary=summary, timeout_s=policy.timeout_s, deadline_s=UNDO_DEADLINE_S
        )

    def _request(self, seq: int, tool: str, version: str, arguments: dict[str, Any]) -> ToolRequest:
        return ToolRequest(
            agent=self._given.agent,
            key_base=self._relative_base,
            seq=seq,
            tool=tool,
            version=version,
            arguments=arguments,
        )

    def _approval(self, item: CallState) -> Approval:
        call = item.call
        return Approval(
            id=_approval_id(item),
            subject=call.tool,
            seq=item.seq,
            arguments=call.arguments,
            digest=digest(call.arguments),
            why=f"Every call of {call.tool} needs a person's yes.",
            evidence=progress.evidence(self._state),
            cost_usd=self._state.usage.cost_usd,
            asked_at=workflow.now(),
        )

    # ------------------------------------------------------------ time

    async def _watch_deadline(self) -> None:
        """Ends the run when its time is used up. The clock stands still while a human is asked."""
        state, approvals = self._state, self._state.approvals
        while self._ending is None:
            await workflow.wait_condition(lambda: state.profile is not None and approvals.asked_since is None)
            assert state.profile is not None
            used = (workflow.now() - state.started).total_seconds() - approvals.waited_s
            left = state.profile.deadline_s - used
            if left <= 0:
                self._ending = Ending(RunOutcome.FAILED, f"deadline: {used:.0f} s are used up")
                return
            try:
                await workflow.wait_condition(
                    lambda: approvals.asked_since is not None, timeout=left, timeout_summary="deadline"
                )
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
        return bool(idle) and self._calls.open == 0 and self._is_long()

    # ------------------------------------------------------------ what the world says and sees

    @workflow.signal(name="decide", description="Answers an approval: approval_id, verdict, approver")
    def decide(self, *payload: Any) -> None:
        self._approvals.decide(*payload)

    @workflow.update(name="decide", description="The same as the Signal, answered with what became of it")
    def decide_now(self, *payload: Any) -> DecisionReply:
        return self._approvals.decide(*payload)

    @workflow.query(description="What the run is doing")
    def status(self) -> RunStatus:
        return progress.status(self._given, self._state, self._ending)

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

    def _parked(self, wait: Wait | None) -> None:
        if wait:
            self._note(wait.why)
        self._phase(Phase.PARKED if wait else Phase.RUNNING)

    def _phase(self, phase: Phase) -> None:
        self._state.phase = phase
        self._changed()

    def _changed(self) -> None:
        state = self._state
        if state.phase in (Phase.RUNNING, Phase.WAITING_HUMAN):
            state.phase = Phase.WAITING_HUMAN if state.approvals.open else Phase.RUNNING
        self._display.show(state, self._ending)


def _approval_id(item: CallState) -> str:
    return f"a{item.seq}"
