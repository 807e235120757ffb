"""The tools of the triage agent. Tickets and replies are files in the agent's workspace, which the clinic's desks read.

    HOLDFAST_HOME/workspace/triage/tickets/<id>.json    outbox/<id>.json

The id is derived from the idempotency key, so a repeated call writes the same file.
"""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from holdfast import Effect, Json, ToolContext, ToolFailed, Undo, tool

Line = Annotated[str, Field(min_length=1, max_length=200)]
Text = Annotated[str, Field(min_length=1, max_length=4000)]

FACTS = {
    "visits": "Visits are moved or cancelled free of charge up to 24 hours before. The scheduling desk calls back on"
    " working days between 8:00 and 16:00.",
    "opening hours": "The clinic is open on working days from 8:00 to 18:00.",
    "payment": "Invoices are due after 30 days. Paying in three instalments is possible. Questions about an amount:"
    " billing desk, working days 9:00 to 12:00, telephone extension 40.",
}


@tool(effect=Effect.READ, service="")
def clinic_facts(ctx: ToolContext, topic: Literal["visits", "opening hours", "payment"]) -> str:
    """What the clinic says about a topic."""
    return FACTS[topic]


@tool(effect=Effect.IDEMPOTENT, service="")
async def open_ticket(
    ctx: ToolContext,
    desk: Literal["nurses", "scheduling"],
    urgency: Literal["now", "today", "routine"],
    title: Line,
    details: Text,
) -> Json:
    """Open a ticket for a desk of the clinic."""
    return _put(ctx, "tickets", {"desk": desk, "urgency": urgency, "title": title, "details": details})


@open_ticket.undo
async def withdraw_ticket(ctx: ToolContext, undo: Undo) -> str | None:
    """Withdraws the ticket, and bars it, so that a frozen attempt cannot open it later."""
    ticket, withdrawn = _place(ctx, "tickets", undo.key), _withdrawn(ctx, undo.key)
    opened = ticket.exists() or (withdrawn.exists() and withdrawn.stat().st_size > 0)
    if ticket.exists():
        ticket.replace(withdrawn)
    withdrawn.touch()
    return f"ticket {ticket.stem} withdrawn" if opened else None


@tool(effect=Effect.IDEMPOTENT, service="", approval=True)
async def send_reply(ctx: ToolContext, to: Line, subject: Line, text: Text) -> Json:
    """Send a reply to the sender of the message."""
    return _put(ctx, "outbox", {"to": to, "subject": subject, "text": text})


def _put(ctx: ToolContext, folder: str, content: Json) -> Json:
    """Writes the file atomically, unless it exists."""
    place = _place(ctx, folder, ctx.key)
    if _withdrawn(ctx, ctx.key).exists():
        raise ToolFailed(f"{place.stem} was withdrawn before it was written")
    if not place.exists():
        draft = place.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(content, ensure_ascii=False, indent=1))
        draft.replace(place)
    return {"id": place.stem, "file": f"{folder}/{place.name}"}


def _place(ctx: ToolContext, folder: str, key: str) -> Path:
    path = ctx.workspace / folder
    path.mkdir(parents=True, exist_ok=True)
    return path / f"{sha256(key.encode()).hexdigest()[:12]}.json"


def _withdrawn(ctx: ToolContext, key: str) -> Path:
    return _place(ctx, "tickets", key).with_suffix(".withdrawn")
