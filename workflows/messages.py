"""Messages that people send to a run while it works: checked, then kept for the next turn.

A message neither interrupts a call in flight nor answers a request: the model reads it beside the outcomes.
"""

from __future__ import annotations

from typing import Any

from holdfast.contracts.data import clip
from holdfast.contracts.people import DecisionReply, Message
from holdfast.contracts.wording import did_you_mean
from workflows.approvals import parse
from workflows.run import Run
from workflows.state import RunState

PREFIX = "Message from "
MAX_UNREAD = 20
MAX_SHOWN = 300
"""Bytes of a message that the note about it shows."""


def unread(state: RunState) -> int:
    """How many messages no turn has read yet."""
    return sum(notice.startswith(PREFIX) for notice in state.notices[state.heard or 0 :])


def take(run: Run, payload: tuple[Any, ...]) -> DecisionReply:
    """Takes one message. Never raises, because Temporal drops a Signal that does not decode without a trace."""
    reply = _take(run.state, payload, ended=run.ending is not None)
    run.note(clip(run.state.notices[-1], MAX_SHOWN) if reply.accepted else reply.message)
    run.changed()
    return reply


def _take(state: RunState, payload: tuple[Any, ...], ended: bool) -> DecisionReply:
    message = parse(Message, payload, '{"text": "…", "by": "…"}')
    if isinstance(message, str):
        return _ignored(message)
    if ended:
        return _ignored(f"{message.by} was too late, the run is ending")
    if unread(state) >= MAX_UNREAD:
        return _ignored(f"{MAX_UNREAD} messages are unread already; the next turn reads them")
    state.notices.append(f"{PREFIX}{message.by}: {message.text}")
    flight = ", ".join(c.call.tool for c in state.calls if c.outcome is None)
    rest = f"; it does not interrupt {flight}" if flight else ""
    return DecisionReply(accepted=True, message=f"{message.by}'s message is for turn {state.turn + 1}{rest}")


def unknown_signal(name: str, known: tuple[str, ...], kind: str) -> str:
    """The note about a Signal without a handler. known: the Signals that this kind of run takes from people."""
    takes = f"it takes {' and '.join(known)}" if known else "it takes none from people; send it to one of its runs"
    return f"signal {name[:80]!r} ignored: {kind} has no such signal{did_you_mean(name, known)} ({takes})"


def _ignored(why: str) -> DecisionReply:
    return DecisionReply(accepted=False, message=f"message ignored: {why}")
