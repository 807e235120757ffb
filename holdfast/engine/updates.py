"""Removes Updates that are too large for history, before the workflow sees them (`client.py`).

The server takes an Update of up to 4 MB, but an accepted Update has to fit into an event of 2 MB. A larger one makes
the run's workflow tasks fail for half a minute (server 1.32, temporalio 1.35), or ends the run for good (1.29). A
validator does not help, as a rejection repeats the request. If the worker does not answer the Update at all, the server
rejects it at once.
"""

from __future__ import annotations

from temporalio.bridge.proto.workflow_activation import WorkflowActivation, WorkflowActivationJob

from holdfast.contracts.outside import MAX_BYTES


def without_large(act: WorkflowActivation) -> WorkflowActivation:
    """Removes new Updates that are too large from the activation. Keeps accepted Updates that are replayed."""
    kept = [job for job in act.jobs if not _too_large(job)]
    if len(kept) < len(act.jobs):
        del act.jobs[:]
        act.jobs.extend(kept)
    return act


def _too_large(job: WorkflowActivationJob) -> bool:
    update = job.do_update if job.HasField("do_update") else None
    return bool(update and update.run_validator and sum(len(each.data) for each in update.input) > MAX_BYTES)
