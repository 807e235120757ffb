"""Delivers one webhook in a workflow of its own, so that an address that is down does not delay the run."""

from __future__ import annotations

from typing import Any

from temporalio import workflow
from temporalio.common import VersioningBehavior
from temporalio.exceptions import ActivityError

from activities.webhooks import Webhooks
from holdfast.contracts.webhooks import Delivered, Hook, Undelivered
from workflows.activity_runner import ActivityRunner, Host, why
from workflows.progress import plain
from workflows.start_input import one

SEND_S = 10.0
DEADLINE_S = 86_400.0


# Auto-upgrade: a delivery may take hours, and must not keep an old build alive.
@workflow.defn(name="DeliveryWorkflow", versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class DeliveryWorkflow:
    """Runs one activity, which Temporal retries. Its retries add nothing to history."""

    @workflow.run
    async def run(self, *payload: Any) -> Delivered:
        """Takes one `Hook`."""
        hook = one(Hook, payload)
        activities = ActivityRunner(Host())
        about = f"`{hook.type}` of run `{hook.workflow_id}` to {plain(hook.url)}, id `{hook.id}`"
        workflow.set_current_details(about)
        try:
            delivered = await activities.run(
                Webhooks.deliver, hook, summary=hook.type, timeout_s=SEND_S, deadline_s=DEADLINE_S
            )
        except ActivityError as error:
            delivered = Delivered(ok=False, words=f"gave up: {why(error)}")
        workflow.set_current_details(f"{about}\n\n{'✓' if delivered.ok else '✗'} {plain(delivered.words)}")
        if hook.replay or not delivered.ok:
            summary = "close the dead letter" if delivered.ok else "keep it as a dead letter"
            await activities.run(Webhooks.record_delivery, Undelivered(hook=hook, delivered=delivered), summary=summary)
        return delivered
