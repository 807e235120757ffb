"""The sweep's part for runs whose history does not replay: each is reset, or left to a person."""

from __future__ import annotations

import shlex

from temporalio import activity
from temporalio.client import Client, WorkflowHistory
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Replayer
from temporalio.workflow import NondeterminismError

from activities.boundary import boundary
from holdfast.contracts import key_base
from holdfast.executions import Execution, describe, unknown_run
from holdfast.repairs import Sweep
from holdfast.resets import ENDED, Mended, Replays, Stuck, find_stuck, mend
from holdfast.runtime import Runtime
from holdfast.state.letters import Letter, LetterKind, Letters, LetterState, dump, letter_id
from holdfast.telemetry import metrics
from holdfast.temporal import sandbox


class Resets:
    def __init__(self, runtime: Runtime) -> None:
        self._letters = Letters(runtime.db)

    @activity.defn(name="find_stuck")
    async def find_stuck(self, _: Sweep) -> list[Stuck]:
        with boundary():
            return [Stuck(workflow_id=each.id, run_id=each.run_id) for each in await find_stuck(activity.client())]

    @activity.defn(name="mend")
    async def mend(self, stuck: Stuck) -> str:
        """Resets a run that is stuck, or leaves it to a person; a line about it. Idempotent."""
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
            mended = await mend(client, execution, replays_with(client))
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
        """Leaves the run to a person, once."""
        base = key_base(execution.id, execution.first_run_id)
        id = letter_id(LetterKind.STUCK, base)
        if await self._letters.get(id):
            return
        agent = execution.attributes.get("HoldfastAgent", "")
        await self._letters.write(
            [
                Letter(
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
    # Without Updates: one that a reset repeats does not replay when a Signal came after it (`holdfast.resets`).
    again = f"temporal workflow reset {run} --type FirstWorkflowTask --reapply-exclude Update --reason 'by hand'"
    return [
        f"{again}  # it begins again, under its keys; what was answered by an Update is asked again",
        f"temporal workflow terminate {run}  # the sweep undoes what it did",
    ]


def replays_with(client: Client) -> Replays:
    from workflows.kinds import WORKFLOWS

    replayer = Replayer(
        workflows=WORKFLOWS,
        workflow_runner=sandbox(),
        data_converter=client.data_converter,
        debug_mode=True,  # no limit of two seconds between two yields: a busy machine would fail it
    )

    async def replays(history: WorkflowHistory) -> bool:
        failure = (await replayer.replay_workflow(history, raise_on_replay_failure=False)).replay_failure
        if failure is not None and not isinstance(failure, NondeterminismError):
            raise failure
        return failure is None

    return replays
