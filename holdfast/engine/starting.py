"""Starts runs, for all callers: validates the request and starts one run per agent and request key."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pydantic import ValidationError
from temporalio.client import Client
from temporalio.common import (
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from holdfast.authoring.batch import BatchSpec
from holdfast.authoring.registry import startable
from holdfast.contracts import outside
from holdfast.contracts.batch import BatchInput
from holdfast.contracts.data import Json, digest
from holdfast.contracts.failures import explain
from holdfast.contracts.run import AgentInput, Phase, Standing
from holdfast.engine.client import AGENT, STATUS, TENANT
from holdfast.engine.webhooks import BadAddress, host_of
from holdfast.settings import settings
from holdfast.state.runs import Runs
from holdfast.telemetry import tracing

TASK_TIMEOUT = timedelta(seconds=5)
"""Timeout of a workflow task (default: 10 s). A task takes milliseconds, so this detects a killed worker sooner."""


class BadRequest(Exception):
    """The request cannot become a run. The message says what is wrong and what is expected."""


@dataclass(frozen=True)
class Started:
    """The run of a request."""

    workflow_id: str
    request_key: str
    new: bool
    """False: the key was used before, and this is the run that it started."""
    trace_id: str


async def start_run(
    client: Client,
    runs: Runs,
    agent: str,
    value: Json,
    *,
    task_queue: str,
    request_key: str = "",
    requested_by: str = "",
    tenant: str = "default",
    standing: Sequence[Standing] = (),
    webhook: str = "",
) -> Started:
    """Starts the run of a request, or finds the run that this key has started before, even long after it ended.

    agent: name of the agent or batch. value: its input as JSON data. request_key: any text up to 200 characters; an
    empty one starts a new run.
    standing: effects of earlier attempts at this work that still stand; the run must not repeat them.
    webhook: the address that gets the events of the run (its end, its questions); empty: `HOLDFAST_WEBHOOK_URL`.
    Raises UnknownAgent, BadRequest, KeyReused (the key belongs to another input), StoreUnavailable, RPCError.
    """
    spec = startable(agent)
    if wrong := outside.problem(value, outside.MAX_INPUT):
        raise BadRequest(
            f"the input of agent {agent} {wrong}: leave it where the agent's tools can read it, and give its location"
        )
    try:
        value = spec.input.model_validate(value).model_dump(mode="json")
    except ValidationError as error:
        wanted = ", ".join(spec.input.model_fields)
        raise BadRequest(f"input of agent {agent}: {explain(error)} (its fields are: {wanted})") from None
    key = request_key or secrets.token_hex(4)
    if len(key) > 200 or not key.isprintable() or key != key.strip():
        raise BadRequest(
            "the request key is invalid: use 1 to 200 printable characters without a space at the beginning or end"
        )
    if webhook and isinstance(spec, BatchSpec):
        raise BadRequest(f"{agent} is a batch, and only runs of agents send webhooks: leave out the webhook")
    if webhook := webhook or settings().webhook_url:
        try:
            host_of(webhook, settings().webhook_hosts)
        except BadAddress as bad:
            raise BadRequest(str(bad)) from None
    workflow_id = f"{agent}-{key}"
    with tracing.span("start run", **{"holdfast.authoring.agent": agent, "holdfast.workflow_id": workflow_id}):
        trace_id = tracing.trace_id()
        row = await runs.claim(
            key,
            workflow_id,
            agent,
            digest(value),
            tenant=tenant,
            requested_by=requested_by,
            trace_id=trace_id,
            namespace=client.namespace,
        )
        if row.started_at is not None:
            return Started(row.workflow_id, key, new=False, trace_id=row.trace_id)
        names = ((AGENT, agent), (STATUS, Phase.RUNNING.value), (TENANT, tenant))
        attributes = TypedSearchAttributes([SearchAttributePair(name, word) for name, word in names])
        # Claimed just now, or by a starter that died before it recorded the start. Starting twice gives one run.
        of: dict[str, Any] = {"request_key": key, "requested_by": requested_by, "tenant": tenant, "trace_id": trace_id}
        if isinstance(spec, BatchSpec):
            kind, request = "BatchWorkflow", BatchInput(batch=agent, input=value, queue=spec.queue, **of)
        else:
            of |= {"standing": list(standing), "webhook": webhook}
            kind, request = "AgentWorkflow", AgentInput(agent=agent, input=value, **of)
        try:
            await client.start_workflow(
                kind,
                request,
                id=row.workflow_id,
                task_queue=task_queue,
                task_timeout=TASK_TIMEOUT,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                search_attributes=attributes,
                static_summary=agent,
            )
        except WorkflowAlreadyStartedError:
            pass  # another starter was first, and its run has already ended
        except RPCError as error:
            if error.status is RPCStatusCode.INVALID_ARGUMENT and "search attribute" in error.message.lower():
                raise BadRequest(f"{error.message}: run `uv run starter.py doctor --fix`, then try again") from None
            raise
        await runs.mark_started(row.workflow_id)
        return Started(row.workflow_id, key, new=True, trace_id=trace_id)
