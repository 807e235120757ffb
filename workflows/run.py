"""A run as the parts of its workflow see it: its input and state, its notes, its phase and its page."""

from __future__ import annotations

import asyncio

from temporalio import workflow

from holdfast.contracts.data import clip
from holdfast.contracts.run import AgentInput, Phase, RunResult
from holdfast.contracts.tool_call import key_base
from holdfast.contracts.turn import Wait
from holdfast.engine.client import AGENT, SEARCH_ATTRIBUTES, STAGE, STATUS, TENANT
from workflows import progress
from workflows.activity_runner import Host
from workflows.inbox import Inbox
from workflows.parent import Parent
from workflows.state import Ending, RunState

MAX_NOTE = 2_000
"""Bytes of a note; it may contain text of people and services."""
MAX_NOTES = 50


class Run(Host):
    """The context that all parts of the workflow share. It holds no decision about the life of the run."""

    stops = True

    def __init__(self, given: AgentInput) -> None:
        info = workflow.info()
        self.given = given
        self.state = (
            RunState.model_validate(given.state)
            if given.state is not None
            # Carried as data: stable over retries, continue-as-new and Reset, and new when the id is reused.
            else RunState(key_base=key_base(info.workflow_id, info.first_execution_run_id), started=info.start_time)
        )
        self.key_base = self.state.key_base.removeprefix(info.workflow_id)
        """Relative to the workflow's own id, so that history does not repeat the id in every request."""
        self.ending: Ending | None = None
        self.result: RunResult | None = None
        self.inbox = Inbox()
        self._parent = Parent(self.state)
        self._outdated = False
        self._paging: asyncio.Task[None] | None = None
        known = info.typed_search_attributes
        self._shown = {key: known.get(key, "") for key in SEARCH_ATTRIBUTES}

    def note(self, *texts: str) -> None:
        """Keeps lines for readers of the run, with the time. A line that repeats the one before is left out."""
        notes = self.state.notes
        for text in (clip(each, MAX_NOTE) for each in texts):
            if not notes or not notes[-1].endswith(text):
                notes.append(f"{workflow.now():%Y-%m-%d %H:%M:%S} {text}")
        del notes[:-MAX_NOTES]
        self._outdated = True

    def enter(self, phase: Phase) -> None:
        self.state.phase = phase
        self.changed()

    def changed(self) -> None:
        """Shows the state to readers, after each change of it. Writes history only for what they see change."""
        state = self.state
        if state.phase in (Phase.RUNNING, Phase.WAITING_HUMAN):
            state.phase = Phase.WAITING_HUMAN if state.approvals.blocking else Phase.RUNNING
        if state.phase is Phase.WAITING_HUMAN:
            self._parent.run_waits()
        if self._paging and self._paging.done():
            self._paging.result()  # raises the error that ended it
        self._outdated = True
        now = {STATUS: state.phase.value, STAGE: state.stage(), AGENT: self.given.agent, TENANT: self.given.tenant}
        if upserts := [key.value_set(value) for key, value in now.items() if self._shown.get(key, "") != value]:
            self._shown = now
            workflow.upsert_search_attributes(upserts)

    def parks_beside(self) -> None:
        """The run waits for calls that are deferred, and for nothing else."""
        self.enter(Phase.PARKED)
        self._parent.run_waits()

    # ------------------------------------------------------------ as the host of the activities

    def parked(self, wait: Wait | None) -> None:
        if wait:
            self.note(wait.why)
            if wait.service:  # not for a rate limit: it is over soon, and another run would wait for it too
                self._parent.run_waits()
        if not wait and self.state.waits:
            return  # others still wait
        if self.state.phase is Phase.COMPENSATING:
            self.changed()
        else:
            self.enter(Phase.PARKED if wait else Phase.RUNNING)

    def went_on(self) -> None:
        self._parent.run_goes_on()

    def places(self) -> int:
        return self.state.places()

    # ------------------------------------------------------------ the page in the Web UI

    def start_page(self) -> None:
        """Keeps the page in a coroutine of its own, which makes it once per workflow task.

        A hundred calls that end, or a hundred questions that are asked or answered, make one page and not a hundred.
        """
        self._paging = asyncio.create_task(self._keep_page())

    async def _keep_page(self) -> None:
        while True:
            # The condition is checked when the workflow task has nothing else left to do. Several hundred Signals in
            # one task, with a page after each, would exceed the two seconds that the SDK allows a task.
            await workflow.wait_condition(lambda: self._outdated and self.inbox.quiet())
            self._outdated = False
            workflow_id = workflow.info().workflow_id
            workflow.set_current_details(progress.page(self.given.agent, workflow_id, self.state, self.ending))
