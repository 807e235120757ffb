"""What happens after the model's final words: the run waits for what is open, and then ends or goes on."""

from __future__ import annotations

from temporalio import workflow

from holdfast.contracts.run import Phase
from workflows import messages, questions
from workflows.approvals import Approvals
from workflows.completion import judge_final, offer_again, out_of_turns
from workflows.deferred import DeferredCalls
from workflows.lookback import Lookback
from workflows.run import Run
from workflows.state import Ending


class Finishing:
    def __init__(self, run: Run, approvals: Approvals, deferred: DeferredCalls, lookback: Lookback) -> None:
        self._run = run
        self._state = run.state
        self._approvals = approvals
        self._deferred = deferred
        self._lookback = lookback

    async def finish(self, final: str) -> Ending | None:
        """The ending after these final words; None when a step is missing, or the model has notices to read."""
        state = self._state
        # The last turn: no turn is left to read what arrives, which is no reason to undo what is done.
        last = out_of_turns(state) is not None
        if state.withdrawn and not last and (again := offer_again(state, workflow.now())):
            return self._go_on(again)
        if self._deferred.open_ends:
            await self._open_ends(last)
        await self._lookback.done()
        state.final = None
        if state.notices and not last:  # the model has to read these, and finish again
            return None
        if unread := messages.unread(state):
            self._run.note(
                f"{unread} messages came after the last turn that the run may take: the agent has not read them"
            )
        verdict = judge_final(state, final)
        return verdict if isinstance(verdict, Ending) else self._go_on(verdict)

    def _go_on(self, notice: str) -> None:
        """The model gets one more turn, and this notice."""
        self._state.final = None
        self._state.notices.append(notice)
        self._run.note(notice)

    async def _open_ends(self, last: bool) -> None:
        """Waits for what must be settled before the end: by a service, a person, or one after the other."""
        state = self._state
        goes_on = False
        while not goes_on:
            held = questions.held(state)
            self._approvals.hold_for(held)
            if held and state.phase is Phase.PARKED:
                self._run.enter(Phase.RUNNING)  # shown as WAITING_HUMAN: the run now waits for a person
            elif state.deferred and not held:
                self._run.parks_beside()
            await workflow.wait_condition(lambda held=held: self._can_go_on(last) or questions.held(state) != held)
            goes_on = self._can_go_on(last)
        self._approvals.hold_for([])
        self._run.enter(Phase.RUNNING)

    def _can_go_on(self, last: bool) -> bool:
        return not self._deferred.open_ends or (messages.unread(self._state) > 0 and not last)
