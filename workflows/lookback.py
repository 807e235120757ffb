"""The check that a run makes after a Reset, before it goes on: which of its effects still stand.

The history that a Reset keeps says that the effects were done. But the run may have been cancelled since, or terminated
and swept, and its effects undone. The run first finishes an undo that had begun. It forgets what no longer stands and
tells the model, which can do it again under a new key. An effect from after the point of the Reset that still stands
answers the next call of its tool. A call whose outcome is unknown goes to a person.
"""

from __future__ import annotations

from typing import Any

from temporalio import workflow

from activities.recovery import Repairs
from holdfast.contracts.recovery import LookBack, Past
from holdfast.contracts.run import UndoRecord
from holdfast.contracts.tool_call import Outcome, UndoStatus
from holdfast.contracts.turn import OutcomeStatus, ToolCall
from holdfast.recovery import resets
from workflows import questions
from workflows.activity_runner import ActivityRunner, leaving
from workflows.approvals import Approvals
from workflows.deferred import DeferredCalls
from workflows.gate import not_done
from workflows.run import Run
from workflows.state import CallState
from workflows.tool_calls import ToolCalls


class Lookback:
    def __init__(
        self, run: Run, activities: ActivityRunner, approvals: Approvals, tool_calls: ToolCalls, deferred: DeferredCalls
    ) -> None:
        self._run = run
        self._state = run.state
        self._activities = activities
        self._approvals = approvals
        self._tool_calls = tool_calls
        self._deferred = deferred
        # The server gives a run that it resets a new random seed, at the point of the Reset in its history.
        workflow.register_random_seed_callback(self._reset)

    def _reset(self, seed: int) -> None:
        self._state.look_back_due = self._state.was_reset = True

    def was_reset(self, payload: tuple[Any, ...]) -> None:
        """Takes the sweep's Signal. What people decided before its Reset counts."""
        if told := resets.told_of(payload):
            self._run.note(told.words)
            self._approvals.recall(told.accepted)
        else:
            self._run.note(f"Signal {resets.SIGNAL} ignored: only the sweep sends it, and its payload is not valid")

    async def watch(self) -> None:
        """Looks back after each Reset, as long as the run is open.

        A look that is in flight when the run ends is finished, and swallows the cancellation.
        """
        while not leaving():
            await workflow.wait_condition(lambda: self._state.look_back_due)
            await self._look()
            self._state.look_back_due = False

    async def done(self) -> None:
        """Waits until the run knows what stands."""
        if self._state.look_back_due:
            await workflow.wait_condition(lambda: not self._state.look_back_due)

    async def _look(self) -> None:
        state = self._state
        open_ = [item.seq for item in state.calls if item.outcome is None and not item.acting]
        request = LookBack(key_base=self._run.key_base, seq=state.seq, open=open_)
        found = await self._activities.run(Repairs.look_back, request, summary="what stands after the Reset")
        if not found.last:
            return  # nothing was undone
        gone, doubtful = list(found.gone), list(found.doubtful)
        for past in found.undoing:
            record = UndoRecord(seq=past.seq, tool=past.tool, version=past.version, arguments=past.arguments)
            undone = await self._tool_calls.undo(record)
            if undone.status in (UndoStatus.UNDONE, UndoStatus.NOTHING):
                gone.append(past)
            else:
                doubtful.append(past.model_copy(update={"why": f"its undo began and did not succeed: {undone.note}"}))
        self._forget(sorted(gone, key=lambda past: past.seq))
        # The keys after the point of the Reset are already used.
        state.seq = max(state.seq, found.last)
        state.standing += found.standing
        for past in doubtful:
            call = ToolCall(tool=past.tool, arguments=past.arguments, version=past.version)
            words = f"{past.why}; it may stand"
            outcome = Outcome(status=OutcomeStatus.UNKNOWN, content=f"outcome unknown: {words}", reason=words)
            told = f"Call #{past.seq} of {past.tool}: {outcome.content}. A person settles it"
            state.notices.append(f"{told}. Do not call it again until then.")
            self._deferred.conclude(CallState(call=call, seq=past.seq, outcome=outcome))

    def _forget(self, gone: list[Past]) -> None:
        """Removes these calls from what the run holds for done."""
        state, seqs = self._state, {past.seq for past in gone}
        believed = [past for past in gone if past.seq <= state.seq]
        state.ends = {tool: end for tool, end in state.ends.items() if end.seq not in seqs}
        state.doubts = [each for each in state.doubts if each.seq not in seqs]
        state.saga[:] = [record for record in state.saga if record.seq not in seqs]
        for past in believed:
            self._approvals.withdraw(f"o{past.seq}", f"call #{past.seq} of {past.tool} was undone")
        if not believed:
            return
        names = ", ".join(f"#{past.seq} {past.tool}" for past in believed)
        text = f"Undone while this run was stopped, and no longer standing: {names}."
        self._run.note(f"reset: {text}")
        state.notices.append(f"{text} Call again what is still needed.")
        # Calls that are decided and have not begun may build on them, and so may the turn in flight.
        state.void_turn = state.turn
        for item in state.calls:
            if item.seq in seqs and item.outcome:
                item.outcome = not_done(f"it was undone while this run was stopped ({names})")
            elif item.outcome is None and not item.acting:
                self._approvals.withdraw(questions.approval_id(item), f"what it builds on was undone: {names}")
