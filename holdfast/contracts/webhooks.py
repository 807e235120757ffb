"""A webhook event, and how its delivery ended."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from hashlib import sha256

from pydantic import BaseModel

from holdfast.contracts.data import Json

MAX_ID = 1000
"""Longest workflow id in bytes that servers accept by default."""


class Hook(BaseModel):
    """One event for one address. Input of `DeliveryWorkflow`."""

    type: str
    what: str
    """Identifies the event within its run, e.g. `ended` or `a3`."""
    at: datetime
    """The time of the event."""
    url: str
    workflow_id: str
    key_base: str
    agent: str
    tenant: str = "default"
    request_key: str = ""
    data: Json = {}
    replay: bool = False
    """Whether the event is replayed from its dead letter."""

    @property
    def key(self) -> str:
        """The ledger key. A run that was reset may ask or end again, which is another event."""
        return f"{self.key_base}/hook-{self.what}-{int(self.at.timestamp())}"

    @property
    def id(self) -> str:
        """The header `webhook-id`: the same for every attempt, in characters that are valid in a header."""
        return f"evt_{sha256(self.key.encode()).hexdigest()[:24]}"

    @property
    def delivery_id(self) -> str:
        """The id of the workflow that delivers the event."""
        id = self.key.replace("/", "-")
        return id if len(id.encode()) <= MAX_ID else self.id

    def body(self, page: str) -> str:
        """Returns the payload. page: the address of the run's page in the Web UI."""
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
    """How a delivery ended. `words`: who accepted it, or why it failed."""

    ok: bool
    words: str


class Undelivered(BaseModel):
    """Input of the activity that writes or closes the dead letter of a delivery."""

    hook: Hook
    delivered: Delivered


def payload(type: str, at: datetime, data: Json) -> str:
    stamp = at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"type": type, "timestamp": stamp, "data": data}, ensure_ascii=False)
