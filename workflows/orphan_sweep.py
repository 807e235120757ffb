"""The sweep: finds runs that ended without undoing what they did, and starts a workflow that unwinds each.

It also resets the runs that are stuck because their history does not replay.
"""

from __future__ import annotations

import asyncio
from typing import Any

from temporalio import workflow
from temporalio.common import VersioningBehavior, WorkflowIDReusePolicy
from temporalio.exceptions import ActivityError, WorkflowAlreadyStartedError
from temporalio.workflow import ParentClosePolicy

from activities.recovery import Repairs
from activities.resets import Resets
from holdfast.contracts.recovery import Sweep, Swept
from holdfast.recovery.model import unwind_id
from holdfast.recovery.resets import Stuck
from workflows.activity_runner import ActivityRunner, Host, why
from workflows.progress import plain
from workflows.start_input import one

FIND_S = 120.0
RESET_S = 300.0
RESET_DEADLINE_S = 3600.0
"""Time for all attempts to reset one run. The next sweep begins when this one has ended."""
AT_A_TIME = 4
"""Runs that are reset at a time; a reset replays the history several times."""


# Auto-upgrade: an undo must never wait for a build that has no workers any more.
@workflow.defn(name="OrphanSweep", versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class OrphanSweep:
    @workflow.run
    async def run(self, *payload: Any) -> Swept:
        """Takes one `Sweep`."""
        given = one(Sweep, payload)
        found = await ActivityRunner(Host()).run(
            Repairs.find_orphans, given, summary="look for runs without an end", timeout_s=FIND_S
        )
        ids = [unwind_id(repair.key_base) for repair in found]
        for id, repair in zip(ids, found, strict=True):
            try:
                await workflow.start_child_workflow(
                    "RepairWorkflow",
                    repair,
                    id=id,
                    parent_close_policy=ParentClosePolicy.ABANDON,
                    # A repair that was itself terminated may start again: every part of it is idempotent.
                    id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY,
                    static_summary=f"undo what {repair.workflow_id} left behind",
                )
            except WorkflowAlreadyStartedError:
                continue  # an earlier sweep started it, and it is running
        stuck = await self._mend(given)
        lines = [f"- `{id}`" for id in ids] + [f"- {plain(line)}" for line in stuck]
        workflow.set_current_details("\n".join(lines) or "nothing to do")
        return Swept(found=ids, stuck=stuck)

    async def _mend(self, given: Sweep) -> list[str]:
        """Resets the stuck runs, and returns a line about each. A run that cannot be reset delays no other."""
        activities = ActivityRunner(_AFewAtATime())
        found = await activities.run(
            Resets.find_stuck, given, summary="look for runs whose history does not replay", timeout_s=FIND_S
        )
        return list(await asyncio.gather(*(_mended(activities, each) for each in found)))


class _AFewAtATime(Host):
    def places(self) -> int:
        return AT_A_TIME


async def _mended(activities: ActivityRunner, stuck: Stuck) -> str:
    try:
        return await activities.run(
            Resets.mend,
            stuck,
            summary=f"reset {stuck.workflow_id}, whose history does not replay",
            timeout_s=RESET_S,
            deadline_s=RESET_DEADLINE_S,
            begins=lambda: None,
        )
    except ActivityError as error:
        return f"{stuck.workflow_id}: could not be reset: {why(error)}"
