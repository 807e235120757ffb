"""What people say to a run while it works: checked, then kept for the next turn.

A call in flight is not interrupted, and nothing that waits is answered by it: the model reads it beside the outcomes.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from holdfast.contracts import DecisionReply, Message
from holdfast.tools import explain
from workflows.state import RunState

PREFIX = "Message from "
MAX_UNREAD = 20


def unread(state: RunState) -> int:
    """How many messages no turn has heard yet."""
    return sum(notice.startswith(PREFIX) for notice in state.notices[state.heard or 0 :])


def take(state: RunState, payload: tuple[Any, ...], ended: bool) -> DecisionReply:
    """Takes one message. Never raises: a Signal that does not decode would be lost without a trace."""
    if len(payload) != 1 or not isinstance(payload[0], dict):
        got = json.dumps(payload[0] if len(payload) == 1 else list(payload), default=str)[:200]
        return _ignored(f'expected one JSON object like {{"text": "…", "by": "…"}}, got {got}')
    try:
        message = Message.model_validate(payload[0])
    except ValidationError as error:
        return _ignored(explain(error))
    if ended:
        return _ignored(f"{message.by} was too late, the run is ending")
    if unread(state) >= MAX_UNREAD:
        return _ignored(f"{MAX_UNREAD} messages are unread already; the next turn reads them")
    state.notices.append(f"{PREFIX}{message.by}: {message.text}")
    flight = ", ".join(c.call.tool for c in state.calls if c.outcome is None)
    rest = f"; not interrupted by it: {flight}" if flight else ""
    return DecisionReply(accepted=True, message=f"{message.by}'s message is for turn {_next(state)}{rest}")


def _next(state: RunState) -> int:
    return state.turn + 1


def _ignored(why: str) -> DecisionReply:
    return DecisionReply(accepted=False, message=f"message ignored: {why}")
