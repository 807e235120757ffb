"""How a run ended, kept in the store: it outlives Temporal's retention, and a cancelled run has no other result."""

from __future__ import annotations

from temporalio import activity

from activities.boundary import boundary, this_workflow
from holdfast.contracts import RunEnd
from holdfast.reliability import faults
from holdfast.reliability.faults import Point
from holdfast.runtime import Runtime
from holdfast.state.runs import Runs


class RunRecords:
    def __init__(self, runtime: Runtime) -> None:
        self._runs = Runs(runtime.db)

    @activity.defn(name="record_end")
    async def record_end(self, end: RunEnd) -> None:
        """Idempotent."""
        result = end.result
        with boundary():
            await self._runs.finish(
                this_workflow(),
                result.outcome,
                result.model_dump_json(),
                agent=result.agent,
                tenant=end.tenant,
                trace_id=result.trace_id,
            )
            faults.reached(Point.END_RECORDED, "run")
