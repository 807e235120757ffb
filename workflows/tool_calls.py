"""The tool calls and undos of a run: each an activity of its own, with a deadline."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError

from activities.recovery import Repairs
from activities.tools import Tools
from holdfast.contracts.profile import Effect, ToolPolicy
from holdfast.contracts.recovery import RunRef
from holdfast.contracts.run import UndoRecord
from holdfast.contracts.tool_call import Checked, GiveUp, Outcome, ToolRequest, UndoOutcome, UndoStatus
from holdfast.contracts.turn import OutcomeStatus, ToolCall
from workflows.activity_runner import ASK_DEADLINE_S, UNDO_DEADLINE_S, ActivityRunner, leaving, why
from workflows.run import Run
from workflows.state import CallState


class ToolCalls:
    """The tool calls of one run."""

    def __init__(self, run: Run, activities: ActivityRunner) -> None:
        self._given = run.given
        self._state = run.state
        self._key_base = run.key_base
        self._activities = activities
        self._registered = {record.seq for record in run.state.saga}

    async def tool(self, call: ToolCall, seq: int, since: datetime) -> Outcome:
        """Runs a tool call to its outcome, or to a `wait` when its service is down.

        since: when the call was first tried; its deadline counts from there.
        """
        policy = self._state.policy(call.tool) or ToolPolicy()
        left = policy.deadline_s - (workflow.now() - since).total_seconds()
        request = self._request(seq, call.tool, call.version, call.arguments)
        try:
            outcome = await self._activities.run(
                Tools.tool,
                request,
                summary=f"#{seq} {call.tool} ({policy.service})",
                # An attempt of a `probe` tool may ask first and then act, each within the tool's timeout.
                timeout_s=policy.timeout_s * (2 if policy.effect is Effect.PROBE else 1),
                deadline_s=left,
                deferrable=policy.deferrable,
                queue=policy.queue,
                begins=lambda: self._begins(policy, call, seq),
                settle=not policy.pure,
                waited=lambda outcome: self._state.spent.update({str(seq): outcome.usage}),
            )
        except ActivityError as error:
            # Its deadline passed, or it was cancelled before it could report how it ended.
            if policy.pure and leaving():
                raise asyncio.CancelledError from None
            if policy.pure or policy.effect is Effect.READ:
                return Outcome(status=OutcomeStatus.FAILED, content=f"gave up: {why(error)}")
            return Outcome(status=OutcomeStatus.UNKNOWN, content=f"outcome unknown, gave up: {why(error)}")
        if outcome.wait and (not policy.deferrable or not outcome.wait.service or left <= 0):
            # It waited too long. The ledger knows whether an earlier attempt has acted.
            outcome = await self.give_up(call, seq, f"gave up after {policy.deadline_s:.0f} s: {outcome.wait.why}")
        if policy.pure and outcome.status is OutcomeStatus.UNKNOWN:
            # A pure call has no effect outside, so there is nothing for a person to settle.
            return outcome.model_copy(update={"status": OutcomeStatus.FAILED, "content": f"failed: {outcome.reason}"})
        return outcome

    async def give_up(self, call: ToolCall, seq: int, why: str) -> Outcome:
        """Closes a call that is not tried any more, even one that was never sent. Returns what is known of it."""
        given_up = GiveUp(request=self._request(seq, call.tool, call.version, call.arguments), why=why)
        return await self._activities.run(Tools.give_up, given_up, summary=f"#{seq} {call.tool}: give up")

    async def check(self, item: CallState, arguments: dict[str, Any]) -> Checked:
        """Whether the tool of a call accepts these arguments."""
        call = item.call
        request = self._request(item.seq, call.tool, call.version, arguments)
        return await self._activities.run(Tools.check, request, summary=f"#{item.seq} {call.tool}: edited arguments")

    async def undo(self, record: UndoRecord) -> UndoOutcome:
        """Undoes one effect. Raises ActivityError when its deadline passes."""
        policy = self._state.policy(record.tool) or ToolPolicy()
        outcome = await self._activities.run(
            Tools.undo,
            self._request(record.seq, record.tool, record.version, record.arguments),
            summary=f"#{record.seq} {record.tool} ({policy.service})",
            timeout_s=policy.timeout_s,
            deadline_s=UNDO_DEADLINE_S,
            queue=policy.queue,
        )
        if outcome.wait:
            return UndoOutcome(status=UndoStatus.FAILED, note=f"gave up: {outcome.wait.why}")
        return outcome

    def _begins(self, policy: ToolPolicy, call: ToolCall, seq: int) -> None:
        """Registers the undo before the effect can start; only once, even when the call is tried again."""
        if policy.undo and seq not in self._registered:
            self._registered.add(seq)
            step = self._state.step_of(call.tool)
            self._state.saga.append(
                UndoRecord(
                    seq=seq,
                    tool=call.tool,
                    version=call.version,
                    arguments=call.arguments,
                    step=step.name if step else "",
                )
            )

    async def own_all(self) -> None:
        """Registers the undos of what a reset run did after the point of the Reset, before the run unwinds.

        This execution has not reached those calls, so its saga does not know them.
        """
        of = RunRef(agent=self._given.agent, key_base=self._key_base, tenant=self._given.tenant)
        known = {record.seq for record in self._state.saga}
        for record in await self._activities.run(Repairs.to_undo, of, summary="what is to be undone"):
            if record.seq not in known:
                step = self._state.step_of(record.tool)
                self._state.saga.append(record.model_copy(update={"step": step.name if step else ""}))
        self._state.saga.sort(key=lambda record: record.seq)

    async def ask_about_doubts(self) -> list[str]:
        """Before the end: asks the services about unknown calls that nothing has undone.

        A call that stays unknown becomes a dead letter for a person. Returns a line about each call.
        """
        of = RunRef(agent=self._given.agent, key_base=self._key_base, tenant=self._given.tenant)
        found: list[str] = []
        for request in await self._activities.run(Repairs.in_doubt, of, summary="calls in doubt"):
            policy = self._state.policy(request.tool) or ToolPolicy()
            try:
                outcome = await self._activities.run(
                    Repairs.ask_probe,
                    request,
                    summary=f"ask about #{request.seq} {request.tool}",
                    timeout_s=policy.timeout_s,
                    deadline_s=ASK_DEADLINE_S,
                )
            except ActivityError as error:
                found.append(f"call #{request.seq} of {request.tool} is in doubt: {why(error)}")
                continue
            found.append(f"call #{request.seq}: {outcome.wait.why if outcome.wait else outcome.content}")
            if not outcome.wait:
                self._state.found_out(request.tool, request.seq, outcome.status)
        return found

    def _request(self, seq: int, tool: str, version: str, arguments: dict[str, Any]) -> ToolRequest:
        return ToolRequest(
            agent=self._given.agent,
            key_base=self._key_base,
            seq=seq,
            tool=tool,
            version=version,
            arguments=arguments,
            tenant=self._given.tenant,
        )
