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
from holdfast.executions import Execution
from holdfast.repairs import Sweep
from holdfast.resets import Mended, Replays, find_stuck, mend
from holdfast.runtime import Runtime
from holdfast.state.letters import Letter, LetterKind, Letters, LetterState, dump, letter_id
from holdfast.telemetry import metrics
from holdfast.temporal import sandbox


class Resets:
    def __init__(self, runtime: Runtime) -> None:
        self._letters = Letters(runtime.db)

    @activity.defn(name="reset_stuck")
    async def reset_stuck(self, _: Sweep) -> list[str]:
        """Resets the runs that are stuck; a line about each."""
        with boundary():
            client = activity.client()
            return [await self._mend(client, each) for each in await find_stuck(client)]

    async def _mend(self, client: Client, execution: Execution) -> str:
        try:
            mended = await mend(client, execution, _replays(client))
        except RPCError as error:
            # One that cannot be reset must not keep the sweep from the others.
            if error.status is RPCStatusCode.NOT_FOUND:
                return f"{execution.id}: has ended meanwhile"
            if error.status is not RPCStatusCode.INVALID_ARGUMENT:
                raise
            mended = Mended(f"its history does not replay, and it cannot be reset: {error.message}", given_up=True)
        if mended.given_up:
            await self._give_up(execution, mended.words)
        return f"{execution.id}: {mended.words}"

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
    return [
        f"temporal workflow reset {run} --type FirstWorkflowTask --reason 'by hand'  # it begins again, under its keys",
        f"temporal workflow terminate {run}  # the sweep undoes what it did",
    ]


def _replays(client: Client) -> Replays:
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
