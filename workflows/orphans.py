"""The sweep: finds runs that ended without undoing what they did, and starts the workflow that does it for each.

It also resets the runs that cannot go on because their history does not replay.
"""

from __future__ import annotations

from typing import Any

from temporalio import workflow
from temporalio.common import VersioningBehavior, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.workflow import ParentClosePolicy

with workflow.unsafe.imports_passed_through():
    from holdfast.repairs import Repair, Sweep, Swept, unwind_id
    from workflows.calls import Calls
    from workflows.given import one
    from workflows.progress import plain

FIND_S = 120.0
RESET_S = 300.0


# Undoing must never wait for a build whose workers are gone, so any build goes on with it.
@workflow.defn(name="OrphanSweep", versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class OrphanSweep:
    @workflow.run
    async def run(self, *payload: Any) -> Swept:
        """Takes one `Sweep`."""
        given = one(Sweep, payload)
        found = await Calls(lambda wait: None).run(
            "find_orphans", given, list[Repair], summary="look for runs without an end", timeout_s=FIND_S
        )
        ids = [unwind_id(repair.key_base) for repair in found]
        for id, repair in zip(ids, found, strict=True):
            try:
                await workflow.start_child_workflow(
                    "RepairWorkflow",
                    repair,
                    id=id,
                    parent_close_policy=ParentClosePolicy.ABANDON,
                    # One that was itself terminated may begin again: every part of it is idempotent.
                    id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY,
                    static_summary=f"undo what {repair.workflow_id} left behind",
                )
            except WorkflowAlreadyStartedError:
                continue  # an earlier sweep's, and at work
        stuck: list[str] = []
        if workflow.patched("resets-stuck-runs"):
            stuck = await Calls(lambda wait: None).run(
                "reset_stuck",
                given,
                list[str],
                summary="reset runs whose history does not replay",
                timeout_s=RESET_S,
            )
        lines = [f"- `{id}`" for id in ids] + [f"- {plain(line)}" for line in stuck]
        workflow.set_current_details("\n".join(lines) or "nothing to do")
        return Swept(found=ids, stuck=stuck)
