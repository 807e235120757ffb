"""Defines failures: their types, what each means for a retry, and the exceptions that tools raise."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pydantic import ValidationError


class ErrorType(StrEnum):
    """The `type` of every ApplicationError that leaves an activity."""

    RATE_LIMITED = "rate_limited"
    UNAVAILABLE = "unavailable"
    """The service answered with 5xx."""
    TIMEOUT = "timeout"
    CONNECTION = "connection"
    """The connection was dropped or reset after the request was sent."""
    UNREACHABLE = "unreachable"
    """Connection refused, no such host, connect timeout: the request was certainly not sent."""
    REFUSED = "refused"
    """The caller's error; the service will refuse the same request again."""
    UNAUTHORIZED = "unauthorized"
    """The credentials or the account (quota, payment) do not allow it."""
    CONTEXT_OVERFLOW = "context_overflow"
    CONTENT_POLICY = "content_policy"
    BAD_RESPONSE = "bad_response"
    """The service answered, but the answer cannot be read."""
    RAMBLING = "rambling"
    """The model's answer did not end: it was cut at one of our limits or at the model's own."""
    INVALID_ARGUMENTS = "invalid_arguments"
    """The model's arguments do not fit the tool."""
    INVALID_INPUT = "invalid_input"
    """The run's input does not fit the agent."""
    KEY_CONFLICT = "key_conflict"
    """One idempotency key was used with two different arguments."""
    FENCED = "fenced"
    """Another attempt has taken over; this attempt may neither act nor record."""
    MALFORMED_OUTPUT = "malformed_output"
    """The model's output stayed invalid after all re-asks."""
    BAD_GRAPH = "bad_graph"
    """A mistake in the agent's graph."""
    TOOL_FAILED = "tool_failed"
    """The tool reports that it did nothing and never will."""
    FORGOTTEN = "forgotten"
    """The store lacks data that the history names. The run waits, because the store may be restored again."""
    INTERNAL = "internal"
    """A bug in the tool."""
    UNKNOWN_OUTCOME = "unknown_outcome"
    """An earlier attempt was interrupted, and it cannot be determined whether it acted."""
    BAD_DATA = "bad_data"
    """Data cannot be read, stored or sent; a retry with the same data will fail too."""
    NOT_YET = "not_yet"
    """Not a failure: the same attempt continues later."""
    AGENT_FAILED = "agent_failed"
    """The run failed; its result is in the details."""


@dataclass(frozen=True)
class Failure:
    """One failure, with what decides about a retry."""

    type: ErrorType
    message: str
    """One line of at most `MESSAGE_LIMIT` characters, without credentials."""
    retry: bool = False
    maybe_done: bool = False
    """The request was sent, so its effect may have happened."""
    retry_after: float | None = None
    """Seconds that the service asked to wait, at most `RETRY_AFTER_CAP`."""


MESSAGE_LIMIT = 400


class ToolRefused(Exception):
    """Raised by a tool for a mistake of the caller. The model gets the text; the call is not retried."""


class ToolFailed(Exception):
    """Raised by a tool that certainly did nothing and never will. The call is not retried."""


def explain(error: ValidationError) -> str:
    """Returns a validation error as text that a model or a person can act on."""
    lines = (f"{'.'.join(str(p) for p in e['loc']) or 'arguments'}: {e['msg']}" for e in error.errors())
    return "; ".join(lines)
