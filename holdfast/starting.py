"""Starting a run: checked at the door, once per agent and request key, from wherever it is asked for."""

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

from agents.registry import startable
from holdfast import outside
from holdfast.batch import BatchInput, BatchSpec
from holdfast.contracts import AgentInput, Json, Phase, Standing, digest
from holdfast.hooks import BadAddress, host_of
from holdfast.settings import settings
from holdfast.state.runs import Runs
from holdfast.telemetry import tracing
from holdfast.temporal import AGENT, STATUS, TENANT
from holdfast.tools import explain

TASK_TIMEOUT = timedelta(seconds=5)
"""A workflow task is milliseconds of work; a worker killed within one is noticed after this long (default: 10 s)."""


class BadRequest(Exception):
    """A request that cannot become a run. The message says what is wrong with it and what is expected."""


@dataclass(frozen=True)
class Started:
    """A request's run."""

    workflow_id: str
    request_key: str
    new: bool
    """False: the key was used before, and this is that run."""
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
    """Starts the run of a request, or finds the one that this key has started before, even long after it ended.

    agent: its name, or that of a batch. value: its input as JSON data. request_key: any text up to 200 characters;
    none means a new run.
    standing: effects of earlier tries of this work that the run must not have again.
    webhook: address that is told of the run's end and of what it needs; empty: `HOLDFAST_WEBHOOK_URL`.
    Raises UnknownAgent, BadRequest, KeyReused (the key belongs to another input), StoreUnavailable, RPCError.
    """
    spec = startable(agent)
    if wrong := outside.problem(value, outside.MAX_INPUT):
        raise BadRequest(
            f"the input of agent {agent} {wrong}: leave it where the agent's tools can read it, and say where"
        )
    try:
        value = spec.input.model_validate(value).model_dump(mode="json")
    except ValidationError as error:
        wanted = ", ".join(spec.input.model_fields)
        raise BadRequest(f"input of agent {agent}: {explain(error)} (its fields are: {wanted})") from None
    key = request_key or secrets.token_hex(4)
    if len(key) > 200 or not key.isprintable() or key != key.strip():
        raise BadRequest("a request key is up to 200 printable characters without space around it")
    if webhook and isinstance(spec, BatchSpec):
        raise BadRequest(f"{agent} is a batch, and only the run of an agent tells a webhook: name none")
    if webhook := webhook or settings().webhook_url:
        try:
            host_of(webhook, settings().webhook_hosts)
        except BadAddress as bad:
            raise BadRequest(str(bad)) from None
    workflow_id = f"{agent}-{key}"
    with tracing.span("start run", **{"holdfast.agent": agent, "holdfast.workflow_id": workflow_id}):
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
        # Claimed by us just now, or by a starter that died before it could tell: starting twice gives one run.
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
            pass  # and ended already: another starter was first, and its run was quick
        except RPCError as error:
            if error.status is RPCStatusCode.INVALID_ARGUMENT and "search attribute" in error.message.lower():
                raise BadRequest(f"{error.message}: run `uv run starter.py doctor --fix`, then try again") from None
            raise
        await runs.mark_started(row.workflow_id)
        return Started(row.workflow_id, key, new=True, trace_id=trace_id)
