"""The sweep's activities for runs whose history does not replay: each run is reset, or left to a person."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from temporalio import activity
from temporalio.client import Client, WorkflowHistory
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Replayer
from temporalio.workflow import NondeterminismError

from activities.boundary import boundary
from holdfast.contracts.recovery import Sweep
from holdfast.contracts.tool_call import key_base
from holdfast.engine.client import sandbox
from holdfast.engine.executions import Execution, describe, unknown_run
from holdfast.engine.runtime import Runtime
from holdfast.recovery.dead_letters import DeadLetter, DeadLetters, LetterKind, LetterState, dump, letter_id
from holdfast.recovery.resets import ENDED, Mended, Replays, Stuck, find_stuck, mend
from holdfast.telemetry import metrics


class Resets:
    def __init__(self, runtime: Runtime, workflows: Sequence[type]) -> None:
        """workflows: the ones that the worker serves. A history is replayed with them."""
        self._letters = DeadLetters(runtime.db)
        self._workflows = workflows

    @activity.defn(name="find_stuck")
    async def find_stuck(self, _: Sweep) -> list[Stuck]:
        with boundary():
            return [Stuck(workflow_id=each.id, run_id=each.run_id) for each in await find_stuck(activity.client())]

    @activity.defn(name="mend")
    async def mend(self, stuck: Stuck) -> str:
        """Resets a stuck run, or leaves it to a person. Returns a line about it. Idempotent."""
        with boundary():
            return f"{stuck.workflow_id}: {await self._mend(activity.client(), stuck)}"

    async def _mend(self, client: Client, stuck: Stuck) -> str:
        try:
            execution = await describe(client, stuck.workflow_id, stuck.run_id)
        except RPCError as error:
            if not unknown_run(error):
                raise
            return ENDED
        try:
            mended = await mend(client, execution, replays_with(client, self._workflows))
        except RPCError as error:
            if unknown_run(error):
                return ENDED
            if error.status is not RPCStatusCode.INVALID_ARGUMENT:
                raise
            mended = Mended(f"its history does not replay, and it cannot be reset: {error.message}", given_up=True)
        if mended.given_up:
            await self._give_up(execution, mended.words)
        return mended.words

    async def _give_up(self, execution: Execution, words: str) -> None:
        """Leaves the run to a person: writes a dead letter, once."""
        base = key_base(execution.id, execution.first_run_id)
        id = letter_id(LetterKind.STUCK, base)
        if await self._letters.get(id):
            return
        agent = execution.attributes.get("HoldfastAgent", "")
        await self._letters.write(
            [
                DeadLetter(
                    id=id,
                    kind=LetterKind.STUCK,
                    state=LetterState.OPEN,
                    agent=agent,
                    tenant=execution.attributes.get("HoldfastTenant", "default"),
                    workflow_id=execution.id,
                    key_base=base,
                    key="",
                    subject=agent,
                    role="",
                    cause=words,
                    context=dump({"commands": _commands(execution.id)}),
                )
            ]
        )
        metrics.dead_letter(LetterKind.STUCK)


def _commands(workflow_id: str) -> list[str]:
    run = f"--workflow-id {shlex.quote(workflow_id)}"
    # Without Updates: an Update that a reset repeats does not replay if a Signal came after it (`recovery.resets`).
    again = f"temporal workflow reset {run} --type FirstWorkflowTask --reapply-exclude Update --reason 'by hand'"
    return [
        f"{again}  # the run begins again under the same keys; it asks again what an Update had answered",
        f"temporal workflow terminate {run}  # the sweep undoes what it did",
    ]


def replays_with(client: Client, workflows: Sequence[type]) -> Replays:
    replayer = Replayer(
        workflows=workflows,
        workflow_runner=sandbox(),
        data_converter=client.data_converter,
        debug_mode=True,  # no deadlock limit of two seconds between yields: a busy machine would exceed it
    )

    async def replays(history: WorkflowHistory) -> bool:
        failure = (await replayer.replay_workflow(history, raise_on_replay_failure=False)).replay_failure
        if failure is not None and not isinstance(failure, NondeterminismError):
            raise failure
        return failure is None

    return replays
