"""The workflow that repairs a run after its end: it tries calls and compensations again, records a person's findings,
and unwinds a run that was terminated.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from temporalio import workflow
from temporalio.common import VersioningBehavior
from temporalio.exceptions import ActivityError, ApplicationError

from activities.recovery import Repairs
from activities.tools import Tools
from holdfast.contracts.failures import ErrorType
from holdfast.contracts.people import Finding
from holdfast.contracts.recovery import Action, ActionEnd, Repair, RepairEnd, RepairResult
from holdfast.contracts.tool_call import UndoStatus
from holdfast.contracts.turn import OutcomeStatus, Wait
from workflows.activity_runner import ASK_DEADLINE_S, UNDO_DEADLINE_S, ActivityRunner, Host, why
from workflows.progress import plain
from workflows.start_input import one
from workflows.webhooks import send

Record = Callable[[Repairs, RepairEnd], Awaitable[RepairResult]]
"""An activity that records how a repair ended."""
WORDS = {"call": "replay", "undo": "undo", "settle": "settle", "ask": "ask about"}


# Auto-upgrade: an undo must never wait for a build that has no workers any more.
@workflow.defn(name="RepairWorkflow", versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class RepairWorkflow(Host):
    @workflow.init
    def __init__(self, *payload: Any) -> None:
        self._given = one(Repair, payload)
        self._activities = ActivityRunner(self)
        self._ends: list[ActionEnd] = []
        self._doing = "starting"

    @workflow.run
    async def run(self, *_: Any) -> RepairResult:
        """Takes one `Repair`."""
        given = self._given
        if not given.actions:
            return await self._unwind()
        refused = await self._activities.run(
            Repairs.begin_repair, given, summary=f"begin: {given.letter or given.key_base}"
        )
        if refused:
            self._show(refused)
            raise ApplicationError(refused, type=ErrorType.REFUSED, non_retryable=True)
        await self._do(given.actions)
        return await self._record(Repairs.record_repair)

    async def _unwind(self) -> RepairResult:
        """Undoes the effects of a run that can no longer do it itself, and records the end of that run."""
        survey = await self._activities.run(Repairs.survey, self._given, summary="what was left behind")
        if survey.alive:
            words = "nothing was undone: the run is still open, or its end is recorded"
            self._show(words)
            return RepairResult(ok=True, words=words)
        await self._do(survey.actions)
        return await self._record(Repairs.record_orphan, survey.webhook)

    async def _do(self, actions: list[Action]) -> None:
        for action in actions:
            self._show(_name(action))
            self._ends.append(await self._one(action))

    async def _record(self, activity: Record, webhook: str = "") -> RepairResult:
        self._show("recording the outcome")
        end = RepairEnd(repair=self._given, ends=self._ends, webhook=webhook)
        result = await self._activities.run(activity, end, summary="record the outcome")
        self._show(result.words)
        if result.hook:
            await send(result.hook)
        return result

    async def _one(self, action: Action) -> ActionEnd:
        try:
            match action.do:
                case "call":
                    return await self._call(action)
                case "undo":
                    return await self._undo(action)
                case "settle":
                    return await self._settle(action)
                case "ask":
                    return await self._ask(action)
        except ActivityError as error:
            return ActionEnd(action=action, ok=False, words=f"{_name(action)} gave up: {why(error)}")

    async def _call(self, action: Action) -> ActionEnd:
        outcome = await self._activities.run(
            Tools.tool,
            self._given.request(action),
            summary=_name(action),
            timeout_s=action.timeout_s,
            deadline_s=action.deadline_s,
            queue=action.queue,
        )
        if outcome.wait:
            return ActionEnd(action=action, ok=False, words=f"{action.tool} could not be replayed: {outcome.wait.why}")
        if outcome.status is OutcomeStatus.OK:
            by = f" ({outcome.origin})" if outcome.origin else ""
            words = f"{action.tool} replayed{self._by()}{by}"
        else:
            words = (
                f"{action.tool} was replayed{self._by()} and is {outcome.status}: {outcome.reason or outcome.content}"
            )
        return ActionEnd(action=action, ok=outcome.status is OutcomeStatus.OK, words=words)

    async def _undo(self, action: Action) -> ActionEnd:
        outcome = await self._activities.run(
            Tools.undo,
            self._given.request(action),
            summary=_name(action),
            timeout_s=action.timeout_s,
            deadline_s=UNDO_DEADLINE_S,
            queue=action.queue,
        )
        if outcome.wait:
            words = f"undo of {action.tool} gave up: {outcome.wait.why}"
            return ActionEnd(action=action, ok=False, words=words, undo=UndoStatus.FAILED)
        ok = outcome.status in (UndoStatus.UNDONE, UndoStatus.NOTHING)
        words = outcome.note or ("nothing to undo" if ok else f"undo of {action.tool} failed")
        return ActionEnd(action=action, ok=ok, words=words, undo=outcome.status)

    async def _settle(self, action: Action) -> ActionEnd:
        by, happened = self._given.by, action.happened
        said = f"settled by {by}: {'it happened' if happened else 'it did not happen'}"
        undo = UndoStatus.UNDONE if happened else UndoStatus.FAILED
        if action.key:
            finding = Finding(key=action.key, happened=happened, result=action.result, by=by, comment=action.comment)
            outcome = await self._activities.run(Tools.settle, finding, summary=_name(action))
            if happened is not (outcome.status is OutcomeStatus.OK):
                return ActionEnd(action=action, ok=False, words=f"not settled: the ledger says {outcome.content}")
        return ActionEnd(action=action, ok=True, words=f"{said}. {action.comment}".removesuffix(". "), undo=undo)

    async def _ask(self, action: Action) -> ActionEnd:
        outcome = await self._activities.run(
            Repairs.ask_probe,
            self._given.request(action),
            summary=_name(action),
            timeout_s=action.timeout_s,
            deadline_s=ASK_DEADLINE_S,
        )
        if outcome.wait:
            return ActionEnd(action=action, ok=False, words=f"{action.tool} could not be asked: {outcome.wait.why}")
        known = outcome.status is not OutcomeStatus.UNKNOWN
        return ActionEnd(action=action, ok=known, words=outcome.content)

    def _by(self) -> str:
        return f" by {self._given.by}" if self._given.by else ""

    def parked(self, wait: Wait | None) -> None:
        self._show(f"waiting: {wait.why}" if wait else "trying again")

    def _show(self, doing: str) -> None:
        """Updates the page in the Web UI."""
        ends = "\n".join(f"- {'✓' if e.ok else '✗'} {_name(e.action)}: {plain(e.words)}" for e in self._ends)
        run = f"Run `{self._given.workflow_id}`"
        workflow.set_current_details("\n\n".join(filter(None, (f"**{plain(doing)}**", run, ends))))


def _name(action: Action) -> str:
    return f"{WORDS[action.do]} {f'#{action.seq} ' if action.seq else ''}{action.tool or action.step}"
