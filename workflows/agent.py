"""The life of an agent: plan → gate → human → act → … → finish or unwind. One workflow runs every agent.

No I/O, no wall clock: everything that can fail is an activity. What has to survive continue-as-new is in `RunState`
and nowhere else. The coroutines may be dropped whenever no activity is open, and start again from that state.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import RawValue, VersioningBehavior
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.workflow import ContinueAsNewVersioningBehavior

with workflow.unsafe.imports_passed_through():
    from holdfast.aio import to_the_end
    from holdfast.contracts.data import clip
    from holdfast.contracts.failures import ErrorType
    from holdfast.contracts.people import Approval, DecisionReply, Verdict
    from holdfast.contracts.run import AgentInput, Pending, Phase, RunEnd, RunOutcome, RunResult, RunStatus
    from holdfast.contracts.tool_call import Outcome, key_base
    from holdfast.contracts.turn import OutcomeStatus, PlanRequest, PlanResult, Question, Reply, Usage, Wait
    from holdfast.recovery import resets
    from workflows import messages, progress, questions
    from workflows.activity_runner import ActivityRunner, spent_by, why
    from workflows.approvals import Approvals
    from workflows.completion import gone, judge_final, judge_turn, offer_again, out_of_patience, out_of_turns
    from workflows.deferred import DeferredCalls
    from workflows.gate import Gate
    from workflows.inbox import Inbox
    from workflows.lookback import Lookback, void
    from workflows.parent import Parent
    from workflows.saga import unwind
    from workflows.start_input import RUN, start
    from workflows.state import CallState, Ending, RunState
    from workflows.tool_calls import ToolCalls
    from workflows.webhooks import Webhooks

PLAN_S = 420.0
"""Three model calls of up to 130 s (`Settings.model_total_s`), and the time between them."""
NO_PROFILE_DEADLINE = timedelta(days=1)
"""How long a run tries to complete its first turn."""
MAX_ANSWERS = 1_000_000
"""Bytes of all answers of a turn together: the next turn's request has to fit into a Temporal payload (2 MB)."""
MAX_NOTE = 2_000
"""Bytes of a note; it may contain text of people and services."""


# Pinned: a run stays with the build that it began on. Has an effect only where workers are versioned.
@workflow.defn(name="AgentWorkflow", versioning_behavior=VersioningBehavior.PINNED)
class AgentWorkflow:
    @workflow.init
    def __init__(self, *payload: Any) -> None:
        # In the constructor, because a Signal may be handled before `run` begins.
        given = start(AgentInput, payload, RUN)
        info = workflow.info()
        self._given = given
        self._state = (
            RunState.model_validate(given.state)
            if given.state is not None
            # Carried as data: stable over retries, continue-as-new and Reset, and new when the id is reused.
            else RunState(key_base=key_base(info.workflow_id, info.first_execution_run_id), started=info.start_time)
        )
        self._inbox = Inbox()
        self._webhooks = Webhooks(given, self._state.key_base)
        self._approvals = Approvals(self._state.approvals, self._note, self._changed, self._webhooks.asked)
        self._parent = Parent(self._state)
        self._activities = ActivityRunner(self._parked, self._parent.goes_on, self._state.places, stops=True)
        self._state.waits = self._activities.waits
        self._tool_calls = ToolCalls(given.agent, given.tenant, self._state, self._activities)
        self._deferred = DeferredCalls(
            self._state, self._approvals, self._activities, self._tool_calls, self._conclude, self._note
        )
        self._lookback = Lookback(
            self._state, self._approvals, self._activities, self._tool_calls, self._conclude, self._note
        )
        self._gate = Gate(self._state, given.standing, self._approvals, self._tool_calls, self._note)
        self._display = progress.Display(given, self._page, self._inbox.quiet)
        self._ending: Ending | None = None
        self._result: RunResult | None = None
        self._turns_here = 0

    # ------------------------------------------------------------ the life of a run

    @workflow.run
    async def run(self, *_: Any) -> RunResult:
        """Takes one `AgentInput`."""
        given = self._given
        self._display.start()
        if given.state is not None:
            self._changed()
        ending = await self._live()
        if ending is None:
            await workflow.wait_condition(workflow.all_handlers_finished)
            # No await from here: a Signal handled now would be lost.
            carried = self._state.model_dump(mode="json", exclude_defaults=True)
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
        work = asyncio.create_task(self._work())
        watch = asyncio.create_task(self._watch_deadline())
        look = asyncio.create_task(self._lookback.watch())
        self._deferred.resume()
        try:
            await workflow.wait_condition(
                lambda: bool(
                    work.done() or self._ending or self._continues_idle() or self._deferred.broken() or look.done()
                )
            )
        except asyncio.CancelledError:
            reason = workflow.cancellation_reason()
            words = f"cancelled: {clip(reason, MAX_NOTE)}" if reason else "cancelled"
            self._ending = Ending(RunOutcome.CANCELLED, words)
        watch.cancel()
        try:
            if broken := self._deferred.broken() or (look.exception() if look.done() else None):
                raise broken
            ending = self._ending or (work.result() if work.done() else None)
        except ActivityError as error:
            # An activity whose failure no code handles, such as `check` or `settle`. The run fails itself, and unwinds.
            ending = self._ending = Ending(RunOutcome.FAILED, f"gave up: {why(error)}")
        rest = [task for task in (work, look, *self._deferred.unfinished()) if not task.done()]
        for task in rest:
            task.cancel()
        if not work.done() or self._activities.open:
            # Tool calls settle first: an effect must not end after its undo began.
            await to_the_end(workflow.wait(rest))
        return self._ending or ending

    async def _work(self) -> Ending | None:
        state = self._state
        while self._ending is None:
            if not state.calls:
                if state.final is None and self._is_long() and self._at_rest():
                    return None
                if ending := (await self._plan() if state.final is None else await self._finish(state.final)):
                    return ending
            under_way = (self._one(item) for item in state.calls if item.outcome is None)
            # Collects exceptions: a plain gather would end with the first cancelled child (one that waits for a person)
            # while an effect of another child is still in flight.
            for error in await asyncio.gather(*under_way, return_exceptions=True):
                if error is not None:
                    raise error
            if state.calls:
                share = MAX_ANSWERS // len(state.calls)
                state.answers = [clip(c.outcome.content, share) for c in state.calls if c.outcome]
                statuses = [c.outcome.status for c in state.calls if c.outcome]
                state.statuses = [] if {*statuses} == {OutcomeStatus.OK} else statuses
                ending, state.calls = judge_turn(state), []
                if ending:
                    return ending
        return self._ending

    async def _close(self, ending: Ending) -> RunResult:
        """Undoes what has to be undone, and stores the result where it outlives Temporal's retention."""
        self._ending = ending
        self._state.calls = []  # the remaining calls waited for a person and never began
        self._approvals.close()
        if ending.outcome.unwinds and self._state.was_reset and workflow.patched("undo-beyond-reset"):
            await self._tool_calls.own_all()
        if ending.outcome.unwinds and self._state.saga:
            self._phase(Phase.COMPENSATING)
            await unwind(self._state.saga, self._tool_calls.undo, self._changed)
        if ending.outcome.unwinds and self._state.seq and workflow.patched("ask-at-the-end"):
            self._note(*await self._tool_calls.ask_about_doubts())
        result = self._result = progress.result(self._given, self._state, ending)
        self._phase(Phase.ENDED)
        failed = ending.outcome is RunOutcome.FAILED
        end = RunEnd(
            tenant=self._given.tenant,
            result=result,
            input=self._given.input if failed else None,
            requested_by=self._given.requested_by,
        )
        more = await self._activities.run("record_end", end, list[Pending], summary=f"record: {ending.outcome}")
        if more:  # unknown calls that only the ledger knows
            result = self._result = result.model_copy(update={"pending": [*result.pending, *more]})
        await self._webhooks.ended(result)
        return result

    # ------------------------------------------------------------ plan

    async def _plan(self) -> Ending | None:
        """Runs one turn. Sets the calls that it decided, or judges the final words."""
        state = self._state
        await self._lookback.done()
        if not state.planning:
            if ending := out_of_turns(state):
                return ending
            state.turn += 1
            state.planning = True
        request = PlanRequest(
            agent=self._given.agent,
            key_base=self._tool_calls.key_base,
            turn=state.turn,
            base=state.base,
            answers=state.answers,
            statuses=state.statuses,
            notices=state.notices[: state.heard],
            input=self._given.input if state.turn == 1 else None,
            tenant=self._given.tenant,
            replies=state.replies,
            offered=state.owed(),
            open=state.open_tools(),
            tried="turn" in state.spent,
        )
        self._phase(Phase.RUNNING)
        try:
            planned = await self._activities.run(
                "plan",
                request,
                PlanResult,
                summary=f"turn {state.turn}",
                timeout_s=PLAN_S,
                # The profile says how long a run may take, and it comes with the first turn.
                deadline_s=None
                if state.profile
                else (state.started + NO_PROFILE_DEADLINE - workflow.now()).total_seconds(),
                settle=False,
                patience=state.patience(),
                waited=lambda result: self._tried(request, result),
            )
        except ActivityError as error:
            state.spent["turn"] = spent_by(error) or state.spent.get("turn", Usage())
            return Ending(RunOutcome.FAILED, f"turn {state.turn}: {why(error)}")
        await self._lookback.done()  # before the turn's calls get their keys
        self._tried(request, planned)
        if planned.wait and state.lost():
            out_of_patience(state, planned.wait, workflow.now())
            return gone(state.steps())
        if planned.wait:
            return Ending(RunOutcome.FAILED, f"turn {state.turn}: gave up: {planned.wait.why}")
        if planned.refusal:
            return await self._refused_turn(planned.refusal)
        state.profile = planned.profile or state.profile
        self._note(*planned.notes)
        if planned.questions:
            # The same turn goes on with the answers. Notices that arrive meanwhile are for the next turn.
            state.heard = len(request.notices)
            return await self._answers(planned.questions)
        self._turns_here += 1
        # Notices that arrived during the model call are for the next turn.
        del state.notices[: len(request.notices)]
        state.planning, state.answers, state.statuses = False, [], []
        state.heard, state.asked, state.replies = None, [], []
        state.withdrawn = planned.withdrawn
        state.base, state.model = planned.checkpoint, planned.model or state.model
        if state.model:  # a graph may decide without one
            state.models[state.model] = state.models.get(state.model, 0) + 1
        state.spent.pop("turn", None)
        state.usage += planned.usage
        if planned.final is not None:
            return await self._finish(planned.final)
        # Keys are allotted in decision order before any await, so a replay allots the same keys.
        state.calls = [CallState(call=call, seq=state.seq + n) for n, call in enumerate(planned.calls, 1)]
        state.seq += len(state.calls)
        return None

    def _tried(self, request: PlanRequest, planned: PlanResult) -> None:
        """Keeps what the turn has used so far: it counts even if the turn never ends."""
        self._state.spent["turn"] = planned.usage
        request.tried = True

    async def _refused_turn(self, why: str) -> Ending | None:
        """Asks a person what to do when the model refuses a turn by its policy, which no retry changes."""
        state = self._state
        decision = await self._approvals.ask(questions.refused_turn(state, why, workflow.now()))
        state.refused_turns += 1
        if decision.verdict is Verdict.REJECT:
            return Ending(RunOutcome.REJECTED, f"the model refuses turn {state.turn} ({why}): {decision.comment}")
        return None

    async def _answers(self, asked: list[Question]) -> None:
        """Puts the agent's questions to people, waits for all answers, and keeps them for this turn."""
        state = self._state
        approvals = [questions.asked(state, each, workflow.now()) for each in asked]
        for approval in approvals:
            self._approvals.open(approval)
        for question, approval in zip(asked, approvals, strict=True):
            decision = await self._approvals.ask(approval)
            if all(reply.id != question.id for reply in state.replies):
                state.replies.append(Reply(id=question.id, value=decision.answer))

    async def _finish(self, final: str) -> Ending | None:
        """The ending after the model's final words; None when a step is missing, or the model has notices to read."""
        state = self._state
        # The last turn: no turn is left to read what arrives, which is no reason to undo what is done.
        last = out_of_turns(state) is not None and workflow.patched("last-turn-ends")
        may_offer = bool(state.withdrawn) and not last and workflow.patched("offer-again")
        if may_offer and (again := offer_again(state, workflow.now())):
            state.final = None
            state.notices.append(again)
            self._note(again)
            return None
        state.final = final
        if self._deferred.open_ends and workflow.patched("wait-for-open-ends"):
            await self._open_ends(last)
        await self._lookback.done()
        state.final = None
        if state.notices and not last:  # the model has to read these, and finish again
            return None
        if unread := messages.unread(state):
            self._note(f"{unread} messages came after the last turn that the run may take: the agent has not read them")
        verdict = judge_final(state, final)
        if isinstance(verdict, Ending):
            return verdict
        state.notices.append(verdict)
        self._note(verdict)
        return None

    async def _open_ends(self, last: bool) -> None:
        """Waits for what must be settled before the end: by a service, a person, or one after the other."""
        state = self._state
        goes_on = False
        follow = workflow.patched("holds-what-is-asked-later")
        while not goes_on:
            held = questions.held(state)
            self._approvals.hold_for(held)
            if held and state.phase is Phase.PARKED:
                self._phase(Phase.RUNNING)  # `_changed` makes it WAITING_HUMAN: the run now waits for a person
            elif state.deferred and not held:
                self._phase(Phase.PARKED)
                self._parent.stands_still()
            await workflow.wait_condition(
                lambda held=held: self._can_go_on(last) or (follow and questions.held(state) != held)
            )
            goes_on = self._can_go_on(last)
        self._approvals.hold_for([])
        self._phase(Phase.RUNNING)

    def _can_go_on(self, last: bool) -> bool:
        return not self._deferred.open_ends or (messages.unread(self._state) > 0 and not last)

    # ------------------------------------------------------------ gate, human, act

    async def _one(self, item: CallState) -> None:
        """Takes one call of a decision to its outcome."""
        await self._lookback.done()
        outcome = await self._gate.outcome(item)
        if outcome is None:
            await self._lookback.done()
            outcome = void(self._state, item) or await self._act(item)
        if item.edited_by:
            given = json.dumps(item.call.arguments, ensure_ascii=False)
            text = f"[{item.edited_by} changed the arguments to {given}]\n{outcome.content}"
            outcome = outcome.model_copy(update={"content": text})
        item.outcome = outcome
        self._conclude(item)

    def _conclude(self, item: CallState) -> None:
        """Accounts for the outcome, and asks a person if the platform cannot settle it."""
        assert item.outcome is not None
        self._state.account(item)
        self._note(*item.outcome.notes)
        self._deferred.ask(item)
        self._changed()

    async def _act(self, item: CallState) -> Outcome:
        item.acting = True
        outcome = await self._tool_calls.tool(item.call, item.seq, workflow.now())
        if outcome.wait is None:
            return outcome
        self._note(outcome.wait.why)
        return self._deferred.put_off(item, outcome.wait)

    # ------------------------------------------------------------ time

    async def _watch_deadline(self) -> None:
        """Ends the run when its time is used up. The clock stops while the run waits for a person."""
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
        """Whether it is time to continue as new."""
        profile = self._state.profile
        limit = profile is not None and self._turns_here >= profile.turns_per_execution
        return limit or workflow.info().is_continue_as_new_suggested()

    def _continues_idle(self) -> bool:
        """Whether the run only waits for a person or is parked, and its history is long."""
        idle = self._state.approvals.blocking or self._state.phase is Phase.PARKED
        return bool(idle) and self._at_rest() and self._is_long()

    def _at_rest(self) -> bool:
        return self._activities.open == 0 and self._webhooks.idle and not self._lookback.due

    # ------------------------------------------------------------ Signals, Updates and queries

    @workflow.signal(name="decide", description="Answers an approval: approval_id, verdict, approver")
    async def decide(self, *payload: Any) -> None:
        await self._take_decision(*payload)

    @workflow.update(name="decide", description="The same as the Signal, answered with what came of it")
    async def decide_now(self, *payload: Any) -> DecisionReply:
        return await self._take_decision(*payload)

    async def _take_decision(self, *payload: Any) -> DecisionReply:
        await self._approvals.foresee(*payload)
        return await self._inbox.take(lambda: self._approvals.decide(*payload))

    @workflow.signal(name="message", description="Sends a message to the run: text, by")
    async def message(self, *payload: Any) -> None:
        await self._inbox.take(lambda: self._hear(*payload))

    @workflow.update(name="message", description="The same as the Signal, answered with what comes of it")
    async def message_now(self, *payload: Any) -> DecisionReply:
        return await self._inbox.take(lambda: self._hear(*payload))

    @workflow.signal(name=resets.SIGNAL, description="Sent by the sweep: it has reset this run")
    async def was_reset(self, *payload: Any) -> None:
        await self._approvals.foreseen()
        await self._inbox.take(lambda: self._reset(*payload))

    def _reset(self, *payload: Any) -> None:
        if told := resets.told_of(payload):
            self._note(told.words)
            self._approvals.recall()
        else:
            self._note(f"Signal {resets.SIGNAL} ignored: only the sweep sends it, and its payload is not valid")
        self._display.page()

    @workflow.signal(dynamic=True, description="Any other name: noted, and nothing else")
    async def other(self, name: str, _: Sequence[RawValue]) -> None:
        """Takes a Signal of any other name. Raw, because Temporal drops what cannot be converted without a trace."""
        await self._inbox.take(lambda: self._unknown(name))

    def _unknown(self, name: str) -> None:
        self._note(messages.unknown_signal(name, ("decide", "message"), "a run"))
        self._display.page()

    def _hear(self, *payload: Any) -> DecisionReply:
        reply = messages.take(self._state, payload, ended=self._ending is not None)
        self._note(clip(self._state.notices[-1], 300) if reply.accepted else reply.message)
        self._changed()
        return reply

    @workflow.query(description="What the run is doing")
    def status(self) -> RunStatus:
        return progress.status(self._given, self._state, self._ending)

    @workflow.query(description="Approvals that wait for a human")
    def approvals(self) -> list[Approval]:
        return list(self._state.approvals.open.values())

    @workflow.query(description="The result, or null while the run goes on")
    def result(self) -> RunResult | None:
        return self._result

    def _note(self, *texts: str) -> None:
        notes = self._state.notes
        for text in (clip(each, MAX_NOTE) for each in texts):
            if not notes or not notes[-1].endswith(text):
                notes.append(f"{workflow.now():%Y-%m-%d %H:%M:%S} {text}")
        del notes[:-50]

    def _parked(self, wait: Wait | None) -> None:
        if wait:
            self._note(wait.why)
            if wait.service:  # not for a rate limit: it is over soon, and another run would wait for it too
                self._parent.stands_still()
        if not wait and self._activities.waits and workflow.patched("parked-until-all-go-on"):
            return
        if self._state.phase is Phase.COMPENSATING and workflow.patched("says-what-it-undoes"):
            self._changed()
            return
        self._phase(Phase.PARKED if wait else Phase.RUNNING)

    def _phase(self, phase: Phase) -> None:
        self._state.phase = phase
        self._changed()

    def _changed(self) -> None:
        state = self._state
        if state.phase in (Phase.RUNNING, Phase.WAITING_HUMAN):
            state.phase = Phase.WAITING_HUMAN if self._state.approvals.blocking else Phase.RUNNING
        if state.phase is Phase.WAITING_HUMAN:
            self._parent.stands_still()
        self._display.show(state)

    def _page(self) -> str:
        return progress.page(self._given.agent, workflow.info().workflow_id, self._state, self._ending)
