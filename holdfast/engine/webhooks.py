"""Webhooks: events of a run, signed as Standard Webhooks specifies (https://www.standardwebhooks.com).

Webhook payloads leave the organization. They say what happened and link to the run, but contain no input, arguments or
results.
"""

from __future__ import annotations

import secrets as tokens
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING
from urllib.parse import quote

from holdfast.contracts.data import clip
from holdfast.contracts.people import Approval
from holdfast.contracts.run import AgentInput, RunResult
from holdfast.contracts.webhooks import Hook
from holdfast.contracts.wording import answer_commands

if TYPE_CHECKING:
    import httpx2

ENDED, AMENDED, NEEDS_INPUT, TEST = "run.ended", "run.amended", "run.needs_input", "webhook.test"

MAX_ADDRESS = 2000
MAX_WHY = 2000
"""Longest reason for a question, in bytes."""


class BadAddress(Exception):
    """Webhooks cannot be sent to this address. The message is one line that says what is expected."""


# ------------------------------------------------------------------ events


def needs_input(given: AgentInput, workflow_id: str, key_base: str, approval: Approval, at: datetime) -> Hook:
    data = {
        "id": approval.id,
        "kind": approval.kind,
        "subject": approval.subject,
        "why": clip(approval.why, MAX_WHY),
        "role": approval.role,
        "answer": [f"uv run starter.py {command}" for command in answer_commands(workflow_id, approval)],
    }
    return Hook(
        type=NEEDS_INPUT,
        what=approval.id,
        at=at,
        url=given.webhook,
        workflow_id=workflow_id,
        key_base=key_base,
        agent=given.agent,
        tenant=given.tenant,
        request_key=given.request_key,
        data=data,
    )


def run_is(type: str, result: RunResult, workflow_id: str, request_key: str, tenant: str, at: datetime) -> Hook:
    """Returns the event for the end of a run (`ENDED`), or for a result that a repair changed later (`AMENDED`)."""
    return Hook(
        type=type,
        # A run ends once, but it can be amended twice within a second.
        what="ended" if type == ENDED else f"amended-{at:%f}",
        at=at,
        url=result.webhook,
        workflow_id=workflow_id,
        key_base=result.key_base,
        agent=result.agent,
        tenant=tenant,
        request_key=request_key,
        data={
            "outcome": result.outcome,
            "percent": result.percent,
            "pending": [{"step": each.step, "role": each.role} for each in result.pending],
            "stands": [{"tool": each.tool, "call": each.seq} for each in result.stands],
        },
    )


# ------------------------------------------------------------------ sending


def host_of(url: str, hosts: str) -> str:
    """Returns the host of a webhook address if it is allowed. hosts: as in `HOLDFAST_WEBHOOK_HOSTS`.

    Raises BadAddress. Called when a run is started and again before each attempt: a run may be started without this
    check, and the list may have become shorter.
    """
    import httpx2  # the parser of the client that sends it: two parsers may disagree on the host

    try:
        read = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise BadAddress(f"the webhook's address is not a valid URL: {error}") from None
    if read.scheme not in ("http", "https") or not read.host or len(url) > MAX_ADDRESS:
        raise BadAddress(
            "the webhook's address is not valid: use an http or https URL such as https://hooks.example.com/holdfast, "
            f"with at most {MAX_ADDRESS} characters"
        )
    if read.userinfo:
        raise BadAddress(
            "the webhook's address contains credentials, which would be stored in the run's history: remove them"
        )
    allowed = hosts.lower().split()
    if allowed and not any(fnmatchcase(read.host.lower(), pattern) for pattern in allowed):
        raise BadAddress(
            f"webhooks are not sent to {read.host}: use a host that HOLDFAST_WEBHOOK_HOSTS allows, or add this one"
        )
    return read.host


async def post(http: httpx2.AsyncClient, url: str, id: str, body: str, secrets: Sequence[str]) -> int:
    """Sends a webhook, signed with each secret, and returns the status. Follows no redirect.

    Raises httpx2's errors, also for a status other than 2xx.
    """
    from standardwebhooks import Webhook

    now = datetime.now(UTC)
    headers = {
        "content-type": "application/json",
        "user-agent": "holdfast",
        "webhook-id": id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign(id, now, body) for secret in secrets),
    }
    # Only the status is read: the body of the response may be endless.
    async with http.stream("POST", url, content=body, headers=headers, follow_redirects=False) as response:
        response.raise_for_status()
        return response.status_code


def new_id() -> str:
    """Returns an id for an event that belongs to no run."""
    return f"evt_{tokens.token_hex(12)}"


def page(ui_url: str, namespace: str, workflow_id: str) -> str:
    """Returns the address of a run's page in the Web UI."""
    return f"{ui_url}/namespaces/{namespace}/workflows/{quote(workflow_id, safe='')}"
