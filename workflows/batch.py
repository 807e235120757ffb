"""A batch: one run of an agent for each item, each a child workflow, a window of them at a time.

No I/O: listing the items and writing the batch's report are activities. Only `BatchState`, a cursor and counts,
survives continue-as-new. A batch continues as new only when none of its children is open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from pydantic import ValidationError
from temporalio import workflow
from temporalio.common import RawValue, SearchAttributePair, TypedSearchAttributes, WorkflowIDReusePolicy
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    CancelledError,
    ChildWorkflowError,
    TerminatedError,
    WorkflowAlreadyStartedError,
)
from temporalio.workflow import ChildWorkflowCancellationType, ContinueAsNewVersioningBehavior, ParentClosePolicy

from activities.batches import Batches
from activities.runs import RunRecords
from holdfast.aio import to_the_end
from holdfast.contracts.batch import (
    BatchInput,
    BatchReport,
    BatchState,
    ChildNews,
    Item,
    ItemFailure,
    ListRequest,
)
from holdfast.contracts.failures import ErrorType
from holdfast.contracts.run import AgentInput, Items, Phase, RunEnd, RunOutcome, RunResult, RunStatus
from holdfast.contracts.tool_call import key_base
from holdfast.contracts.turn import Wait
from holdfast.engine.client import AGENT, STATUS, TENANT
from workflows import batch_decisions, messages
from workflows.activity_runner import ActivityRunner, Host, why
from workflows.inbox import Inbox
from workflows.start_input import BATCH, MAX_NAME, start
from workflows.state import Ending

LIST_S = 300.0
REPORT_S = 300.0
DEADLINE_S = 86_400.0
"""Time for all attempts to list the items, or to write the report."""
TASK_TIMEOUT = timedelta(seconds=5)


@workflow.defn(name="BatchWorkflow")
class BatchWorkflow(Host):
    @workflow.init
    def __init__(self, *payload: Any) -> None:
        given = start(BatchInput, payload, BATCH)
        info = workflow.info()
        self._given = given
        self._state = (
            BatchState.model_validate(given.state)
            if given.state is not None
            else BatchState(key_base=key_base(info.workflow_id, info.first_execution_run_id), started=info.start_time)
        )
        self._inbox = Inbox()
        self._activities = ActivityRunner(self)
        self._ahead: list[Item] = []
        self._open: dict[str, asyncio.Task[None]] = {}
        """By the child's workflow id."""
        self._news_of: dict[str, ChildNews] = {}
        """The last `child` Signal of each open child that sent one."""
        self._started_here = 0
        self._changes = 0
        self._broken: BaseException | None = None
        self._report: asyncio.Task[None] | None = None
        self._ending: Ending | None = None
        self._result: RunResult | None = None
        self._shown_status = ""

    # ------------------------------------------------------------ the life of a batch

    @workflow.run
    async def run(self, *_: Any) -> RunResult:
        """Takes one `BatchInput`."""
        given = self._given
        try:
            ending = await self._work()
        except asyncio.CancelledError:
            ending = await to_the_end(self._cancelled(workflow.cancellation_reason()))
        if ending is None:
            await workflow.wait_condition(workflow.all_handlers_finished)
            # No await from here: a Signal handled now would be lost.
            self._state.listed = False  # the next execution lists again what was not started
            carried = self._state.model_dump(mode="json", exclude_defaults=True)
            workflow.continue_as_new(
                given.model_copy(update={"state": carried}),
                # As a long run does: see AgentWorkflow.
                initial_versioning_behavior=ContinueAsNewVersioningBehavior.AUTO_UPGRADE,
            )
        result = await to_the_end(self._close(ending))
        await workflow.wait_condition(workflow.all_handlers_finished)
        if ending.outcome is RunOutcome.CANCELLED:
            raise asyncio.CancelledError(ending.reason)
        if ending.outcome is RunOutcome.FAILED:
            raise ApplicationError(ending.reason, result, type=ErrorType.AGENT_FAILED, non_retryable=True)
        return result

    async def _work(self) -> Ending | None:
        """Starts items while there is room, until all have ended. None when the batch should continue as new."""
        state = self._state
        self._changed()
        while True:
            if not self._ahead and not state.listed and not self._is_long():
                problem = await self._list()
                self._heed()
                if problem:
                    await self._drained()
                    self._heed()
                    return Ending(RunOutcome.FAILED, f"the {self._unit} cannot be listed: {problem}")
            while self._ahead and self._has_room() and not self._is_long():
                self._start(self._ahead.pop(0))
            if not self._open:
                more = bool(self._ahead) or not state.listed
                if not more and not state.total:
                    return Ending(RunOutcome.FAILED, f"there are no {self._unit}")
                if not more:
                    return batch_decisions.judge(state)
                if self._is_long():
                    await self._drained()
                    self._heed()
                    return None
            await self._news()

    async def _news(self) -> None:
        """Waits until something has changed. Raises the exception of a task that a bug ended."""
        seen = self._changes
        await workflow.wait_condition(lambda: self._changes != seen)
        if self._broken:
            raise self._broken

    def _heed(self) -> None:
        """Raises the cancellation again: an activity that ends before it hears of the cancellation swallows it."""
        if workflow.cancellation_reason() is not None:
            raise asyncio.CancelledError

    async def _list(self) -> str:
        """Lists the next items. Returns why that failed, or an empty string."""
        state = self._state
        request = ListRequest(batch=self._given.batch, input=self._given.input, after=state.after)
        queue = state.profile.queue if state.profile else self._given.queue
        try:
            page = await self._activities.run(
                Batches.list_items,
                request,
                summary=f"list, after {state.after}" if state.after else "list",
                timeout_s=LIST_S,
                deadline_s=DEADLINE_S,
                queue=queue,
            )
        except ActivityError as error:
            return why(error)
        state.profile = page.profile or state.profile
        total = state.done + state.failed + len(self._open) + page.left
        if total < state.total:
            self._note(f"{state.total - total} of the {self._unit} are no longer in the list")
        state.total = total
        self._ahead, state.listed = page.items, len(page.items) == page.left
        state.phase = Phase.RUNNING
        if not state.marks:
            batch_decisions.mark(state, workflow.now())
        self._changed()
        return ""

    async def _drained(self) -> None:
        """Waits until no child and no report is open."""
        await workflow.wait_condition(lambda: not self._open)
        if self._report:
            await self._report

    async def _cancelled(self, reason: str | None) -> Ending:
        """Starts no new children, and waits until the open ones have unwound what they did."""
        self._ending = Ending(RunOutcome.CANCELLED, f"cancelled: {reason}" if reason else "cancelled")
        self._state.phase = Phase.COMPENSATING
        self._changed()
        for task in list(self._open.values()):
            task.cancel()
        await self._drained()
        return self._ending

    async def _close(self, ending: Ending) -> RunResult:
        """Writes the last report, and stores the result where it outlives Temporal's retention."""
        state = self._state
        if self._report:
            await self._report
        if state.profile:
            await self._reported(ended=True)
        if ending.outcome in (RunOutcome.COMPLETED, RunOutcome.PARTIAL):
            ending = batch_decisions.judge(state)  # the report returns where the results are
        self._ending, state.phase = ending, Phase.ENDED
        result = self._result = batch_decisions.result(self._given, state, self._items(), ending)
        self._changed()
        failed = ending.outcome is RunOutcome.FAILED
        end = RunEnd(tenant=self._given.tenant, result=result, input=self._given.input if failed else None)
        await self._activities.run(RunRecords.record_end, end, summary=f"record: {ending.outcome}")
        return result

    # ------------------------------------------------------------ one item

    def _start(self, item: Item) -> None:
        self._state.after = item.id
        self._started_here += 1
        child = f"{workflow.info().workflow_id}.{item.id}"
        task = self._open[child] = asyncio.create_task(self._one(child, item))
        task.add_done_callback(lambda task: self._gone(child, task))
        self._changed()

    def _gone(self, child: str, task: asyncio.Task[None]) -> None:
        # Here and not in the task: a task that is cancelled at once never begins.
        self._open.pop(child, None)
        self._news_of.pop(child, None)
        self._broken = self._broken or (None if task.cancelled() else task.exception())
        self._changed()

    async def _one(self, child: str, item: Item) -> None:
        given, state = self._given, self._state
        assert state.profile is not None
        names = ((AGENT, state.profile.agent), (STATUS, Phase.RUNNING.value), (TENANT, given.tenant))
        request = AgentInput(
            agent=state.profile.agent,
            input=item.input,
            requested_by=workflow.info().workflow_id,
            tenant=given.tenant,
            trace_id=given.trace_id,
        )
        result, failed = None, None
        try:
            result = await workflow.execute_child_workflow(
                "AgentWorkflow",
                request,
                id=child,
                result_type=RunResult,
                task_timeout=TASK_TIMEOUT,
                cancellation_type=ChildWorkflowCancellationType.WAIT_CANCELLATION_COMPLETED,
                parent_close_policy=ParentClosePolicy.REQUEST_CANCEL,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                search_attributes=TypedSearchAttributes([SearchAttributePair(name, word) for name, word in names]),
                static_summary=item.name[:MAX_NAME],
            )
            if result.outcome is not RunOutcome.COMPLETED:
                failed = f"{result.outcome}: {result.reason}"
        except WorkflowAlreadyStartedError:
            failed = f"there is a run {child} already"
        except ChildWorkflowError as error:
            result, failed = _ended(error)
        except asyncio.CancelledError:
            failed = "cancelled before it began"
        self._open.pop(child)
        self._news_of.pop(child, None)
        if self._ending is None or failed is None:
            name = ItemFailure(id=item.id, name=item.name, why=failed[:300]) if failed else None
            batch_decisions.count(state, result, name)
            self._progress(name)

    def _progress(self, failure: ItemFailure | None) -> None:
        """Every few items: a mark for the rate, a note and a report. One report at a time."""
        state = self._state
        assert state.profile is not None
        if failure:
            self._note(f"{failure.name} failed: {failure.why}")
        if (state.done + state.failed) % state.profile.every == 0:
            batch_decisions.mark(state, workflow.now())
            self._note(batch_decisions.tally(state, self._items()))
        due = state.done + state.failed - state.reported >= state.profile.every
        if due and self._ending is None and (self._report is None or self._report.done()):
            self._report = asyncio.create_task(self._reported())

    async def _reported(self, ended: bool = False) -> None:
        state, counts = self._state, self._items()
        assert state.profile is not None
        report = BatchReport(
            batch=self._given.batch, input=self._given.input, items=counts, failures=state.failures, ended=ended
        )
        try:
            state.words = await self._activities.run(
                Batches.report_batch,
                report,
                summary=f"report: {counts.ended}/{counts.total}",
                timeout_s=REPORT_S,
                deadline_s=DEADLINE_S,
                queue=state.profile.queue,
            )
        except ActivityError as error:
            self._note(f"the report could not be written: {why(error)}")
        state.reported = counts.ended
        self._changed()

    # ------------------------------------------------------------ room

    def _has_room(self) -> bool:
        profile = self._state.profile
        return profile is not None and batch_decisions.has_room(profile, len(self._open), self._waiting())

    def _is_long(self) -> bool:
        profile, info = self._state.profile, workflow.info()
        full = profile is not None and self._started_here >= profile.items_per_execution
        full = full or info.is_continue_as_new_suggested()
        return batch_decisions.is_long(full, info.get_current_history_length(), self._waiting())

    def _waiting(self) -> int:
        return sum(news.waits for news in self._news_of.values())

    # ------------------------------------------------------------ Signals and queries

    @workflow.signal(name="child", description="Sent by the batch's own runs: the run waits, or goes on")
    async def child(self, *payload: Any) -> None:
        await self._inbox.take(lambda: self._hear(*payload))

    def _hear(self, *payload: Any) -> None:
        try:
            news = ChildNews.model_validate(payload[0] if payload else None)
        except ValidationError:
            return  # not sent by a child of this batch
        before = self._news_of.get(news.id)
        if news.id in self._open and (before is None or news.number > before.number):
            self._news_of[news.id] = news
            self._changed()

    @workflow.signal(dynamic=True, description="Any other name: noted, and nothing else")
    async def other(self, name: str, _: Sequence[RawValue]) -> None:
        """Takes a Signal of any other name. Raw, because Temporal drops what cannot be converted without a trace."""
        await self._inbox.take(lambda: self._unknown(name))

    def _unknown(self, name: str) -> None:
        self._note(messages.unknown_signal(name, (), "a batch"))
        self._page()

    @workflow.query(description="What the batch is doing")
    def status(self) -> RunStatus:
        return batch_decisions.status(self._given, self._state, self._items(), self._ending, workflow.now())

    @workflow.query(description="The result, or null while the batch goes on")
    def result(self) -> RunResult | None:
        return self._result

    @property
    def _unit(self) -> str:
        return self._state.profile.unit if self._state.profile else "items"

    def _items(self) -> Items:
        return batch_decisions.items(self._state, len(self._open), self._waiting())

    def parked(self, wait: Wait | None) -> None:
        if wait:
            self._note(wait.why)

    def _note(self, text: str) -> None:
        self._state.notes = [*self._state.notes[-49:], f"{workflow.now():%Y-%m-%d %H:%M:%S} {text}"]

    def _changed(self) -> None:
        state = self._state
        self._changes += 1
        if state.phase in (Phase.RUNNING, Phase.PARKED):
            still = bool(self._open) and self._waiting() == len(self._open) and not self._has_room()
            state.phase = Phase.PARKED if still else Phase.RUNNING
        if state.phase != self._shown_status:
            self._shown_status = state.phase
            workflow.upsert_search_attributes([STATUS.value_set(state.phase.value)])
        self._page()

    def _page(self) -> None:
        state, info = self._state, workflow.info()
        workflow.set_current_details(
            batch_decisions.page(self._given, info.workflow_id, state, self._items(), self._ending, workflow.now())
        )


def _ended(error: ChildWorkflowError) -> tuple[RunResult | None, str]:
    """The result of a child that did not complete, if it has one, and why it did not."""
    cause = error.cause
    if isinstance(cause, ApplicationError):
        try:
            result = RunResult.model_validate(cause.details[0]) if cause.details else None
        except ValidationError:
            result = None
        return result, cause.message.removeprefix("critical step gone: ")
    if isinstance(cause, TerminatedError):
        return None, "terminated outside"
    if isinstance(cause, CancelledError):
        return None, "cancelled"
    return None, str(cause or error)
