"""What a run does after a Reset: before it goes on, it checks which of its effects still stand.

The history that a Reset keeps says that they were done. But the run may have been cancelled since, or terminated and
swept, and its effects undone. The run forgets what no longer stands and tells the model, which does it again under a
new key. The run first finishes an undo that is under way. What was done after the point of the Reset and still stands
answers the next call of its tool, and what is in doubt goes to a person.
"""

from __future__ import annotations

from collections.abc import Callable

from temporalio import workflow

from holdfast.contracts import Outcome, OutcomeStatus, ToolCall, UndoRecord, UndoStatus
from holdfast.repairs import LookBack, LookedBack, Past
from workflows.acts import Acts
from workflows.approvals import Approvals
from workflows.calls import Calls, leaving
from workflows.state import CallState, RunState


class Lookback:
    """`concluded` gets each call whose end a person has to find out, `note` what a reader should know."""

    def __init__(
        self,
        state: RunState,
        approvals: Approvals,
        calls: Calls,
        acts: Acts,
        concluded: Callable[[CallState], None],
        note: Callable[..., None],
    ) -> None:
        self._state = state
        self._approvals = approvals
        self._calls = calls
        self._acts = acts
        self._concluded = concluded
        self._note = note
        self.due = False
        """The run was reset and has not looked yet: nothing is decided, begun or ended until it has."""
        # The server gives a run that it has reset another random seed, at the very place in its history.
        workflow.register_random_seed_callback(self._reset)

    def _reset(self, seed: int) -> None:
        self.due = self._state.was_reset = True

    async def watch(self) -> None:
        """Looks back after each Reset, for as long as the run lives.

        A look that is under way when the run ends is finished, and swallows the cancellation.
        """
        while not leaving():
            await workflow.wait_condition(lambda: self.due)
            if workflow.patched("look-back"):
                await self._look()
            self.due = False

    async def done(self) -> None:
        """Returns once the run knows what stands."""
        if self.due:
            await workflow.wait_condition(lambda: not self.due)

    async def _look(self) -> None:
        state = self._state
        open_ = [item.seq for item in state.calls if item.outcome is None and not item.acting]
        request = LookBack(key_base=self._acts.key_base, seq=state.seq, open=open_)
        found = await self._calls.run("look_back", request, LookedBack, summary="what stands after the Reset")
        if not found.last:
            return  # nothing of it was undone
        gone, doubtful = list(found.gone), list(found.doubtful)
        for past in found.undoing:
            record = UndoRecord(seq=past.seq, tool=past.tool, version=past.version, arguments=past.arguments)
            undone = await self._acts.undo(record)
            if undone.status in (UndoStatus.UNDONE, UndoStatus.NOTHING):
                gone.append(past)
            else:
                doubtful.append(past.model_copy(update={"why": f"its undo was begun and did not end: {undone.note}"}))
        self._forget(sorted(gone, key=lambda past: past.seq))
        # Keys beyond the point of the Reset are used up.
        state.seq = max(state.seq, found.last)
        state.standing += found.standing
        for past in doubtful:
            call = ToolCall(tool=past.tool, arguments=past.arguments, version=past.version)
            words = f"{past.why}; it may stand"
            outcome = Outcome(status=OutcomeStatus.UNKNOWN, content=f"outcome unknown: {words}", reason=words)
            told = f"Call #{past.seq} of {past.tool}: {outcome.content}. A person finds out"
            state.notices.append(f"{told}. Do not call it again until then.")
            self._concluded(CallState(call=call, seq=past.seq, outcome=outcome))

    def _forget(self, gone: list[Past]) -> None:
        """Takes these calls out of what the run believes done."""
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
        self._note(f"reset: {text}")
        state.notices.append(f"{text} Call again what is still needed.")
        # What is decided and has not begun may build on them, also the turn that is under way.
        state.void_turn = state.turn
        for item in state.calls:
            if item.seq in seqs and item.outcome:
                item.outcome = _void(f"it was undone while this run was stopped ({names})")
            elif item.outcome is None and not item.acting:
                self._approvals.withdraw(f"a{item.seq}", f"what it builds on was undone: {names}")


def void(state: RunState, item: CallState) -> Outcome | None:
    """The outcome of a call that was decided before the run knew what no longer stands."""
    if not state.void_turn or state.void_turn != state.turn or item.acting:
        return None
    return _void("what was done before was undone while this run was stopped, so decide again")


def _void(why: str) -> Outcome:
    return Outcome(status=OutcomeStatus.ERROR, content=f"not done: {why}. Call again what is still needed.")
