"""Updates that are too large for history. A worker takes them out before the run hears of them (`holdfast.temporal`).

The server takes an Update of up to 4 MB, but an accepted one has to fit into an event of 2 MB. One that does not fails
the run's workflow tasks for half a minute (server 1.32, temporalio 1.35), or ends the run for good (1.29). No validator
helps: a rejection repeats the request. An Update that gets no answer at all is refused by the server, at once.
"""

from __future__ import annotations

from temporalio.bridge.proto.workflow_activation import WorkflowActivation, WorkflowActivationJob

from holdfast.outside import MAX_BYTES


def without_large(act: WorkflowActivation) -> WorkflowActivation:
    """The activation without new Updates that are too large. Those that were accepted and are replayed stay."""
    kept = [job for job in act.jobs if not _too_large(job)]
    if len(kept) < len(act.jobs):
        del act.jobs[:]
        act.jobs.extend(kept)
    return act


def _too_large(job: WorkflowActivationJob) -> bool:
    update = job.do_update if job.HasField("do_update") else None
    return bool(update and update.run_validator and sum(len(each.data) for each in update.input) > MAX_BYTES)
