"""Webhooks: what a run tells the outside, signed by Standard Webhooks (https://www.standardwebhooks.com).

Payloads leave the house, so they say that something happened and where to look: no input, no arguments, no results.
"""

from __future__ import annotations

import json
import secrets as tokens
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import TYPE_CHECKING
from urllib.parse import quote

from pydantic import BaseModel

from holdfast.contracts import AgentInput, Approval, Json, RunResult, clip
from holdfast.wording import answer_commands

if TYPE_CHECKING:
    import httpx2

ENDED, AMENDED, NEEDS_INPUT, TEST = "run.ended", "run.amended", "run.needs_input", "webhook.test"

MAX_ADDRESS = 2000
MAX_ID = 1000
"""Bytes of a workflow id, as servers take them by default."""
MAX_WHY = 2000
"""Bytes of the words for which somebody is asked."""


class BadAddress(Exception):
    """An address that no webhook is sent to. The message is one line that says what is expected."""


class Hook(BaseModel):
    """One event for one address. Input of `DeliveryWorkflow`."""

    type: str
    what: str
    """Of all events of its run: which one, e.g. `ended` or `a3`."""
    at: datetime
    """When it happened."""
    url: str
    workflow_id: str
    key_base: str
    agent: str
    tenant: str = "default"
    request_key: str = ""
    data: Json = {}
    replay: bool = False
    """Sent again from its dead letter."""

    @property
    def key(self) -> str:
        """The ledger key. A run that was reset may ask or end once more: that is another event."""
        return f"{self.key_base}/hook-{self.what}-{int(self.at.timestamp())}"

    @property
    def id(self) -> str:
        """The header `webhook-id`: the same for every try, and in letters that any header takes."""
        return f"evt_{sha256(self.key.encode()).hexdigest()[:24]}"

    @property
    def delivery_id(self) -> str:
        """Id of the workflow that delivers it."""
        id = self.key.replace("/", "-")
        return id if len(id.encode()) <= MAX_ID else self.id

    def body(self, page: str) -> str:
        """The payload. page: address of the run's page in the Web UI."""
        data = {
            "workflow_id": self.workflow_id,
            "request_key": self.request_key,
            "agent": self.agent,
            "tenant": self.tenant,
            "url": page,
            **self.data,
        }
        return payload(self.type, self.at, data)


class Delivered(BaseModel):
    """How a delivery ended. `words`: who took it, or why nobody did."""

    ok: bool
    words: str


class Undelivered(BaseModel):
    """Input of the activity that keeps, or closes, the dead letter of a delivery."""

    hook: Hook
    delivered: Delivered


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
    """How the run ended (`ENDED`), or what a repair after its end has made of that (`AMENDED`)."""
    return Hook(
        type=type,
        # A run ends once, and may be amended twice within a second.
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


def payload(type: str, at: datetime, data: Json) -> str:
    stamp = at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"type": type, "timestamp": stamp, "data": data}, ensure_ascii=False)


# ------------------------------------------------------------------ sending


def host_of(url: str, hosts: str) -> str:
    """The host of an address that webhooks may be sent to. hosts: those allowed, as in `HOLDFAST_WEBHOOK_HOSTS`.

    Raises BadAddress. Checked at the door for whoever starts a run, and before each try: a run may be started past the
    door, and the list may have become shorter.
    """
    import httpx2  # as the client that will send it reads it; two parsers may disagree on what the host is

    try:
        read = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise BadAddress(f"a webhook's address cannot be read: {error}") from None
    if read.scheme not in ("http", "https") or not read.host or len(url) > MAX_ADDRESS:
        raise BadAddress(
            "a webhook's address is http or https, such as https://hooks.example.com/holdfast, "
            f"and has at most {MAX_ADDRESS} characters"
        )
    if read.userinfo:
        raise BadAddress("a webhook's address must not hold credentials: they would stand in the run's history")
    allowed = hosts.lower().split()
    if allowed and not any(fnmatchcase(read.host.lower(), pattern) for pattern in allowed):
        raise BadAddress(f"webhooks are not sent to {read.host}: HOLDFAST_WEBHOOK_HOSTS names the hosts they may go to")
    return read.host


async def post(http: httpx2.AsyncClient, url: str, id: str, body: str, secrets: Sequence[str]) -> int:
    """Sends it, signed with each secret, and follows no redirect. The status; raises httpx2's errors but for 2xx."""
    from standardwebhooks import Webhook

    now = datetime.now(UTC)
    headers = {
        "content-type": "application/json",
        "user-agent": "holdfast",
        "webhook-id": id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign(id, now, body) for secret in secrets),
    }
    # What the answer says besides its status is never read: it may be endless.
    async with http.stream("POST", url, content=body, headers=headers, follow_redirects=False) as response:
        response.raise_for_status()
        return response.status_code


def new_id() -> str:
    """The id of an event that belongs to no run."""
    return f"evt_{tokens.token_hex(12)}"


def page(ui_url: str, namespace: str, workflow_id: str) -> str:
    """A run's page in the Web UI."""
    return f"{ui_url}/namespaces/{namespace}/workflows/{quote(workflow_id, safe='')}"
