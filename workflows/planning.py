"""A turn: one plan call, and what its result asks for before the turn is over."""

from __future__ import annotations

from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.plan import Plan
from holdfast.contracts.people import Verdict
from holdfast.contracts.run import Phase, RunOutcome
from holdfast.contracts.turn import PlanRequest, PlanResult, Question, Reply, Usage
from workflows import questions
from workflows.activity_runner import ActivityRunner, spent_by, why
from workflows.approvals import Approvals
from workflows.completion import gone, out_of_patience, out_of_turns
from workflows.lookback import Lookback
from workflows.run import Run
from workflows.state import CallState, Ending

PLAN_S = 420.0
"""Three model calls of up to 130 s (`Settings.model_total_s`), and the time between them."""
NO_PROFILE_DEADLINE = timedelta(days=1)
"""How long a run tries to complete its first turn."""


class Planning:
    def __init__(self, run: Run, activities: ActivityRunner, approvals: Approvals, lookback: Lookback) -> None:
        self._run = run
        self._state = run.state
        self._activities = activities
        self._approvals = approvals
        self._lookback = lookback
        self.turns_here = 0
        """Turns that have ended in this execution."""

    async def turn(self) -> Ending | None:
        """Runs the next turn, or goes on with the one that was not over.

        Afterwards the state has the calls that it decided, or the model's final words, or neither: then people have
        answered something, and the same turn goes on with that.
        """
        state = self._state
        await self._lookback.done()
        if not state.planning:
            if ending := out_of_turns(state):
                return ending
            state.turn += 1
            state.planning = True
        self._run.enter(Phase.RUNNING)
        request = self._request()
        try:
            planned = await self._plan(request)
        except ActivityError as error:
            state.spent["turn"] = spent_by(error) or state.spent.get("turn", Usage())
            return Ending(RunOutcome.FAILED, f"turn {state.turn}: {why(error)}")
        await self._lookback.done()  # before the turn's calls get their keys
        state.spent["turn"] = planned.usage
        if planned.wait and state.lost():
            out_of_patience(state, planned.wait, workflow.now())
            return gone(state.steps())
        if planned.wait:
            return Ending(RunOutcome.FAILED, f"turn {state.turn}: gave up: {planned.wait.why}")
        if planned.refusal:
            return await self._refused(planned.refusal)
        state.profile = planned.profile or state.profile
        self._run.note(*planned.notes)
        if planned.questions:
            # The same turn goes on with the answers. Notices that arrive meanwhile are for the next turn.
            state.heard = len(request.notices)
            return await self._answers(planned.questions)
        self._decided(request, planned)
        return None

    def _request(self) -> PlanRequest:
        given, state = self._run.given, self._state
        return PlanRequest(
            agent=given.agent,
            key_base=self._run.key_base,
            turn=state.turn,
            base=state.base,
            answers=state.answers,
            statuses=state.statuses,
            notices=state.notices[: state.heard],
            input=given.input if state.turn == 1 else None,
            tenant=given.tenant,
            replies=state.replies,
            offered=state.owed(),
            open=state.open_tools(),
            tried="turn" in state.spent,
        )

    async def _plan(self, request: PlanRequest) -> PlanResult:
        state = self._state

        def waited(result: PlanResult) -> None:
            """What the turn has used so far counts even if it never ends."""
            state.spent["turn"] = result.usage
            request.tried = True

        # The profile says how long a run may take, and it comes with the first turn.
        first = None if state.profile else state.started + NO_PROFILE_DEADLINE - workflow.now()
        return await self._activities.run(
            Plan.plan,
            request,
            summary=f"turn {state.turn}",
            timeout_s=PLAN_S,
            deadline_s=None if first is None else first.total_seconds(),
            settle=False,
            patience=state.patience(),
            waited=waited,
        )

    def _decided(self, request: PlanRequest, planned: PlanResult) -> None:
        """Ends the turn with its decision."""
        state = self._state
        self.turns_here += 1
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
        state.final = planned.final
        # Keys are allotted in decision order before any await, so a replay allots the same keys.
        state.calls = [CallState(call=call, seq=state.seq + n) for n, call in enumerate(planned.calls, 1)]
        state.seq += len(state.calls)

    async def _refused(self, why: str) -> Ending | None:
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
