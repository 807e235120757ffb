"""Requests to people (may this call run, how did that call end, what does the agent need to know) and their decisions.

A decision is checked before it changes anything. A decision that is invalid, late, repeated or for another request
changes nothing and is noted. The state survives continue-as-new, so asking again under the same id finds the answer.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from datetime import timedelta
from typing import Any

from temporalio import workflow

from holdfast.contracts import door
from holdfast.contracts.door import T
from holdfast.contracts.people import Approval, ApprovalDecision, DecidedApproval, DecisionReply, Verdict
from holdfast.contracts.wording import did_you_mean
from workflows.run import Run
from workflows.webhooks import Webhooks

PAST = {
    Verdict.APPROVE: "approved",
    Verdict.REJECT: "rejected",
    Verdict.EDIT: "approved with other arguments",
    Verdict.ANSWER: "answered",
    Verdict.HAPPENED: "settled as happened",
    Verdict.DID_NOT: "settled as not happened",
}
VERDICTS = {
    "tool": (Verdict.APPROVE, Verdict.REJECT, Verdict.EDIT),
    "refusal": (Verdict.APPROVE, Verdict.REJECT),
    "outcome": (Verdict.HAPPENED, Verdict.DID_NOT),
    "question": (Verdict.ANSWER,),
}

MAX_DECISION = 2_000_000
"""Bytes of a decision as JSON. Temporal's own limit, so no history holds a larger decision that was accepted."""


MAX_EARLY = 20
MOMENT = timedelta(milliseconds=10)
"""How long a decision waits for its request to open: until the next workflow task."""


class Approvals:
    """The requests of one run."""

    def __init__(self, run: Run, webhooks: Webhooks) -> None:
        self.state = run.state.approvals
        self._run = run
        self._webhooks = webhooks
        self._moment: asyncio.Task[None] | None = None
        self.recalls = False
        """The sweep has reset the run, and what people had decided before is still to be recalled."""

    async def ask(self, approval: Approval) -> ApprovalDecision:
        """Waits until a person decides, for days if need be, without holding anything in a worker."""
        self.open(approval)
        decided = self.state.decided
        await workflow.wait_condition(lambda: approval.id in decided)
        return decided[approval.id].decision

    def open(self, approval: Approval) -> None:
        """Opens a request and does not wait. Opening it again under the same id changes nothing."""
        if not self.state.asked(approval.id):
            self.state.open[approval.id] = approval
            self._keep_time()
            if self._answered_before(approval.id):
                return
            self._run.changed()
            self._webhooks.asked(approval)

    def recall(self, accepted: list[str]) -> None:
        """After a reset by the sweep: makes the decisions count that people sent before it.

        accepted: the requests whose decision the run had taken by an Update. The sweep sent that one last.
        """
        self.recalls = False
        for decision in self.state.early:
            self.state.recalled.setdefault(decision.approval_id, []).append(decision)
        for name in accepted:
            self.state.recalled[name] = self.state.recalled.get(name, [])[-1:]
        self.state.early.clear()
        for name in list(self.state.open):
            self._answered_before(name)

    def _answered_before(self, name: str) -> bool:
        """Takes the decision that was sent before the reset. Its digest is checked like any other."""
        for decision in self.state.recalled.pop(name, []):
            reply = self._take(decision)
            by = f" (by {decision.approver}, before the reset)" if reply.accepted else ""
            self._run.note(reply.message + by)
            self._run.changed()
            if reply.accepted:
                return True
        return False

    async def answer(self, approval_id: str) -> ApprovalDecision | None:
        """The decision; None when the request was withdrawn."""
        state = self.state
        await workflow.wait_condition(lambda: approval_id not in state.open)
        return state.decided[approval_id].decision if approval_id in state.decided else None

    def withdraw(self, approval_id: str, why: str) -> None:
        """Closes a request that no longer needs an answer."""
        if self.state.open.pop(approval_id, None):
            self.state.withdrawn[approval_id] = why
            self._keep_time()
            self._run.changed()

    def hold_for(self, approval_ids: list[str]) -> None:
        """Marks the requests that the run now waits for: the run's clock stops for them too."""
        if approval_ids != self.state.held:
            self.state.held = approval_ids
            self._keep_time()
            self._run.changed()

    async def foresee(self, *payload: Any) -> None:
        """Waits a moment when the request of a decision is not open yet.

        A query may show a request before the workflow task that opens it is complete. The decision of a person who
        answers at once is then handled in that same task, where the SDK delivers Signals and Updates before results of
        activities.
        """
        name = payload[0].get("approval_id") if payload and isinstance(payload[0], dict) else None
        if not isinstance(name, str) or self.state.asked(name) or name in self.state.withdrawn:
            return
        if self._moment is None or self._moment.done():
            self._moment = asyncio.create_task(self._pass())
        await self.foreseen()

    async def foreseen(self) -> None:
        """Waits until the decisions that came before this have been taken: a recall counts those that came early."""
        if self._moment and not self._moment.done():
            await workflow.wait([self._moment])

    async def _pass(self) -> None:
        """One condition for all early decisions: the SDK would check one for each again and again."""
        before = len(self.state.open)
        with suppress(TimeoutError):
            await workflow.wait_condition(
                lambda: len(self.state.open) > before, timeout=MOMENT, timeout_summary="a decision that came early"
            )

    def decide(self, *payload: Any) -> DecisionReply:
        """Takes one decision of any shape. Never raises: a typed handler would drop what does not decode."""
        reply = self._decide(payload)
        if not reply.accepted:
            self._run.note(reply.message)
        self._run.changed()
        return reply

    def _decide(self, payload: tuple[Any, ...]) -> DecisionReply:
        decision = _parse(payload)
        if isinstance(decision, str):
            return DecisionReply(accepted=False, message=f"decision ignored: {decision}")
        return self._take(decision)

    def _take(self, decision: ApprovalDecision) -> DecisionReply:
        name, state = decision.approval_id, self.state
        if done := state.decided.get(name):
            was = f"{PAST[done.decision.verdict]} by {done.decision.approver}"
            return DecisionReply(
                accepted=False, message=f"decision of {decision.approver} ignored: {name} was already {was}"
            )
        approval = None if self.recalls else state.open.get(name)
        if approval is None and (why := state.withdrawn.get(name)):
            message = f"decision of {decision.approver} ignored: the run withdrew the question {name}, because {why}"
            return DecisionReply(accepted=False, message=message)
        if approval is None:
            state.early.append(decision)
            del state.early[:-MAX_EARLY]
            waiting = ", ".join(state.open) or "none"
            message = f"decision of {decision.approver} ignored: no approval {name!r} is open (open: {waiting})"
            message += did_you_mean(name, state.open)
            return DecisionReply(accepted=False, message=message)
        if decision.verdict not in (fitting := VERDICTS[approval.kind]):
            words = " or ".join(fitting)
            message = (
                f"decision of {decision.approver} ignored: {name} is answered with {words}, not {decision.verdict}"
            )
            return DecisionReply(accepted=False, message=message)
        if decision.digest and decision.digest != approval.digest:
            message = f"decision of {decision.approver} ignored: its digest is not that of {name} ({approval.digest})"
            return DecisionReply(accepted=False, message=message)
        now = workflow.now()
        del state.open[name]
        state.decided[name] = DecidedApproval(approval=approval, decision=decision, decided_at=now)
        self._keep_time()
        return DecisionReply(accepted=True, message=f"{name}: {decision.verdict} recorded")

    def close(self) -> None:
        """Closes all open requests when the run ends: no decision counts any more."""
        self.state.open.clear()
        self._keep_time()
        self._run.changed()

    def _keep_time(self) -> None:
        """Starts or stops counting the time that the run waits for people."""
        state, now = self.state, workflow.now()
        if state.blocking:
            state.asked_since = state.asked_since or now
        elif state.asked_since:
            state.waited_s += (now - state.asked_since).total_seconds()
            state.asked_since = None


def _parse(payload: tuple[Any, ...]) -> ApprovalDecision | str:
    """The decision, or a text that says what is wrong with it."""
    if (size := len(json.dumps(payload, default=str, ensure_ascii=False).encode())) > MAX_DECISION:
        return f"it has {size:,} bytes, and at most {MAX_DECISION:,} are taken"
    example = '{"approval_id": "…", "verdict": "approve", "approver": "…"}'
    decision = parse(ApprovalDecision, payload, example)
    if isinstance(decision, str):
        return decision
    if decision.verdict is Verdict.REJECT and not decision.comment:
        return "a rejection needs its reason in `comment`: the agent reads it"
    if (decision.verdict is Verdict.EDIT) != (decision.arguments is not None):
        return "verdict edit and `arguments` go together: all arguments that the call is to have"
    if (decision.verdict is Verdict.ANSWER) != (decision.answer is not None):
        return "verdict answer and `answer` go together: a text, or other JSON"
    return decision


def parse(kind: type[T], payload: tuple[Any, ...], example: str) -> T | str:
    """One JSON object that a person sent, as this kind, or a text that says what is wrong with it."""
    if len(payload) != 1 or not isinstance(payload[0], dict):
        got = json.dumps(payload[0] if len(payload) == 1 else list(payload), default=str)[:200]
        return f"expected one JSON object like {example}, got {got}"
    try:
        return door.checked(kind, payload[0])
    except door.Unfit as error:
        return str(error)
