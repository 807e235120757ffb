"""What went wrong, what it means, and when to try again: one table for models and tools.

`classify` turns an exception into a `Failure`; `backoff` says how long to wait; `application_error` is the one place
where `non_retryable` and `next_retry_delay` are set. Whether `maybe_done` means "repeat" or "unknown" depends on the
tool's effect class, which is not decided here. `maybe_done` is judged by the request that failed: a tool makes at most
one request with an effect, or what an earlier one did is not accounted for.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import ValidationError

from holdfast.contracts import whole
from holdfast.state.database import StoreUnavailable
from holdfast.tools import ToolFailed, ToolRefused, explain

if TYPE_CHECKING:
    from temporalio.exceptions import ApplicationError


class ErrorType(StrEnum):
    """The `type` of every ApplicationError that leaves an activity."""

    RATE_LIMITED = "rate_limited"
    UNAVAILABLE = "unavailable"
    """The other side said 5xx."""
    TIMEOUT = "timeout"
    CONNECTION = "connection"
    """Dropped or reset while the request was out."""
    UNREACHABLE = "unreachable"
    """Refused, no such host, connect timeout: the request certainly did not go out."""
    REFUSED = "refused"
    """The caller's own error; the same request will be refused again."""
    UNAUTHORIZED = "unauthorized"
    """The credentials or the account (quota, payment) do not allow it."""
    CONTEXT_OVERFLOW = "context_overflow"
    CONTENT_POLICY = "content_policy"
    BAD_RESPONSE = "bad_response"
    """Answered, but the answer cannot be read."""
    RAMBLING = "rambling"
    """The model talks on and on: cut at a limit of ours, or at its own."""
    INVALID_ARGUMENTS = "invalid_arguments"
    """The model's arguments do not fit the tool."""
    INVALID_INPUT = "invalid_input"
    """The run's input does not fit the agent."""
    KEY_CONFLICT = "key_conflict"
    """One idempotency key, two different arguments."""
    FENCED = "fenced"
    """Another attempt took over; this one may neither act nor record."""
    MALFORMED_OUTPUT = "malformed_output"
    """The model's output stayed invalid after all re-asks."""
    BAD_GRAPH = "bad_graph"
    """A mistake of whoever wrote the agent's graph."""
    TOOL_FAILED = "tool_failed"
    """The tool says that it did nothing and never will."""
    FORGOTTEN = "forgotten"
    """The store lacks what history says it holds. It is waited for, for it may be restored once more."""
    INTERNAL = "internal"
    """A bug in the tool."""
    UNKNOWN_OUTCOME = "unknown_outcome"
    """An earlier attempt was cut off, and nothing can tell whether it acted."""
    BAD_DATA = "bad_data"
    """What has to be read, kept or sent cannot be: the same data will be as bad the next time."""
    NOT_YET = "not_yet"
    """No failure: the same attempt is to come again later."""
    AGENT_FAILED = "agent_failed"
    """The run failed; its result is in the details."""


@dataclass(frozen=True)
class Failure:
    """One failure, in the terms that decide what happens next."""

    type: ErrorType
    message: str
    """One line of at most `MESSAGE_LIMIT` characters, without credentials."""
    retry: bool = False
    maybe_done: bool = False
    """The request went out, so its effect may have happened."""
    retry_after: float | None = None
    """Seconds that the other side asked to wait, at most `RETRY_AFTER_CAP`."""


class Meaning(NamedTuple):
    type: ErrorType
    retry: bool
    maybe_done: bool


# Keys, the most specific first: the error code in the answer of a model endpoint; the status; its class of status;
# the code of an MCP error; the exception's name, then its base classes'. `httpx` stands for httpx2 as well.
TABLE: dict[str, Meaning] = {
    #                                              type                        retry  maybe_done
    "code context_length_exceeded": Meaning(ErrorType.CONTEXT_OVERFLOW, False, False),
    "code content_filter": Meaning(ErrorType.CONTENT_POLICY, False, False),
    "code content_policy_violation": Meaning(ErrorType.CONTENT_POLICY, False, False),
    "code insufficient_quota": Meaning(ErrorType.UNAUTHORIZED, False, False),
    "code rate_limit_exceeded": Meaning(ErrorType.RATE_LIMITED, True, False),
    "status 401": Meaning(ErrorType.UNAUTHORIZED, False, False),
    "status 402": Meaning(ErrorType.UNAUTHORIZED, False, False),
    "status 403": Meaning(ErrorType.UNAUTHORIZED, False, False),
    "status 408": Meaning(ErrorType.TIMEOUT, True, True),
    "status 425": Meaning(ErrorType.RATE_LIMITED, True, False),
    "status 429": Meaning(ErrorType.RATE_LIMITED, True, False),
    "status 501": Meaning(ErrorType.REFUSED, False, False),
    "status 302": Meaning(ErrorType.REFUSED, False, True),  # 302 and 303 are how many services answer a form that they
    "status 303": Meaning(ErrorType.REFUSED, False, True),  # took; any other redirect says that nothing was done.
    "status 3xx": Meaning(ErrorType.REFUSED, False, False),
    "status 4xx": Meaning(ErrorType.REFUSED, False, False),
    "status 5xx": Meaning(ErrorType.UNAVAILABLE, True, True),
    "httpx.ConnectError": Meaning(ErrorType.UNREACHABLE, True, False),
    "httpx.ConnectTimeout": Meaning(ErrorType.UNREACHABLE, True, False),
    "httpx.PoolTimeout": Meaning(ErrorType.UNREACHABLE, True, False),
    "httpx.ProxyError": Meaning(ErrorType.UNREACHABLE, True, False),
    "httpx.TimeoutException": Meaning(ErrorType.TIMEOUT, True, True),
    "httpx.TransportError": Meaning(ErrorType.CONNECTION, True, True),
    "httpx.LocalProtocolError": Meaning(ErrorType.INTERNAL, False, True),
    "httpx.DecodingError": Meaning(ErrorType.BAD_RESPONSE, True, True),
    "httpx.TooManyRedirects": Meaning(ErrorType.REFUSED, False, True),
    "httpx.UnsupportedProtocol": Meaning(ErrorType.INTERNAL, False, False),
    "httpx.InvalidURL": Meaning(ErrorType.INTERNAL, False, False),
    "openai.APIError": Meaning(ErrorType.UNAVAILABLE, True, True),  # an error event inside a stream
    "openai.APIResponseValidationError": Meaning(ErrorType.BAD_RESPONSE, True, True),
    "ssl.SSLError": Meaning(ErrorType.CONNECTION, True, True),
    "anyio.EndOfStream": Meaning(ErrorType.CONNECTION, True, True),
    "TimeoutError": Meaning(ErrorType.TIMEOUT, True, True),
    "ConnectionRefusedError": Meaning(ErrorType.UNREACHABLE, True, False),
    "socket.gaierror": Meaning(ErrorType.UNREACHABLE, True, False),
    "ConnectionError": Meaning(ErrorType.CONNECTION, True, True),
    "json.JSONDecodeError": Meaning(ErrorType.BAD_RESPONSE, True, True),
    "UnicodeDecodeError": Meaning(ErrorType.BAD_RESPONSE, True, True),
    # Arguments are validated before a tool runs, so this is an answer that does not fit the tool's own model.
    "pydantic_core.ValidationError": Meaning(ErrorType.BAD_RESPONSE, True, True),
    # An error of the protocol, by its code; one that the server made up says nothing of what was done.
    "mcp -32000": Meaning(ErrorType.CONNECTION, True, True),  # closed before it answered
    "mcp -32001": Meaning(ErrorType.TIMEOUT, True, True),
    "mcp -32042": Meaning(ErrorType.REFUSED, False, False),  # wants a person to visit a page first
    "mcp -32600": Meaning(ErrorType.REFUSED, False, False),
    "mcp -32601": Meaning(ErrorType.REFUSED, False, False),
    "mcp -32602": Meaning(ErrorType.REFUSED, False, False),
    "mcp -32603": Meaning(ErrorType.UNAVAILABLE, True, True),
    "mcp -32700": Meaning(ErrorType.BAD_RESPONSE, True, True),
    "mcp.MCPError": Meaning(ErrorType.REFUSED, False, True),
    "holdfast.ServerDown": Meaning(ErrorType.UNREACHABLE, True, False),
    "holdfast.BadAnswer": Meaning(ErrorType.BAD_RESPONSE, True, True),
    "sqlite3.OperationalError": Meaning(ErrorType.UNAVAILABLE, True, True),
    "psycopg.OperationalError": Meaning(ErrorType.UNAVAILABLE, True, True),
    "holdfast.StoreUnavailable": Meaning(ErrorType.UNAVAILABLE, True, True),
    "holdfast.ToolRefused": Meaning(ErrorType.REFUSED, False, False),
    "holdfast.ToolFailed": Meaning(ErrorType.TOOL_FAILED, False, False),
    # A bug: nobody can say how far it got, and it will be there again on a retry.
    "BaseException": Meaning(ErrorType.INTERNAL, False, True),
}

BAD_DATA = {
    "RecursionError",
    "UnicodeEncodeError",
    "OverflowError",
    "pydantic_core.PydanticSerializationError",
    "psycopg.DataError",
    "sqlite3.DataError",
}
"""Errors that data brings about, and nothing else: neither a service that is down, nor a bug that a deploy mends."""

MESSAGE_LIMIT = 400
BODY_LIMIT = 300
RETRY_AFTER_CAP = 300.0
"""Seconds. A service that asks for more is asked again after five minutes: one answer must not stop all for longer."""
UNBELIEVABLE_S = 86_400.0
"""Who asks for more than a day has counted something else; it is as if nothing had been asked."""

RETRIES = 5
"""Real failures allowed after the first try."""
FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
JITTER = 0.2


def classify(error: BaseException) -> Failure:
    """The failure that an exception means.

    An exception with a `Failure` in its attribute `failure` says for itself. One that the table does not know is judged
    by the cause it was raised `from`, a group of one by its member. Cancellation is no failure: it is raised again.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, asyncio.CancelledError):
        raise error
    told = getattr(error, "failure", None)
    if isinstance(told, Failure):
        return told
    keys = (key for link in _chain(error) for key in _keys(link))
    meaning = next((TABLE[key] for key in keys if key in TABLE), TABLE["BaseException"])
    wait = _retry_after(error) if meaning.retry else None
    return Failure(meaning.type, _message(error, meaning.type), meaning.retry, meaning.maybe_done, wait)


def hopeless(error: BaseException) -> bool:
    """Whether it depends on the data alone, so that trying again cannot help."""
    return any(name in BAD_DATA for link in _chain(error) for name in _names(link))


def backoff(failures: int, retry_after: float | None, jitter: float, longest: float = LONGEST_DELAY) -> float:
    """Seconds to wait after the `failures`-th failure (from 1): 0.5 doubled up to `longest`, ±20 %, or `retry_after`.

    jitter: a random number in [0, 1).
    """
    steps = min(max(failures, 1), 16) - 1  # the cap is long reached; keeps the power small
    delay = min(longest, FIRST_DELAY * 2**steps) * (1 - JITTER + 2 * JITTER * jitter)
    return max(delay, retry_after or 0.0)


def application_error(failure: Failure, delay: float | None) -> ApplicationError:
    """The error that leaves the activity. `delay` in seconds; None leaves it to the retry policy."""
    from temporalio.exceptions import ApplicationError

    return ApplicationError(
        failure.message,
        type=failure.type.value,
        non_retryable=not failure.retry,
        next_retry_delay=None if delay is None else timedelta(seconds=delay),
    )


# ------------------------------------------------------------------ from an exception to its keys in the table


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, except openai's wrapper, which hides the transport error that matters."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return
        if not (seen.__cause__ is not None and "openai.APIConnectionError" in _names(seen)):
            yield seen
        seen = seen.__cause__


def _keys(error: BaseException) -> Iterator[str]:
    names = _names(error)
    if "openai.APIError" in names:
        for code in (getattr(error, "code", None), getattr(error, "type", None), _overflow(error)):
            yield f"code {code}"
            yield f"status {code}"  # so do some gateways name it in an error event
    if "mcp.MCPError" in names:
        yield f"mcp {getattr(error, 'code', None)}"
    status = _status(error)
    if status is not None:
        yield f"status {status}"
        yield f"status {status // 100}xx"
    yield from (name for name in names if name != "BaseException")


def _names(error: BaseException) -> list[str]:
    """Names of the exception's classes, so that a client library need not be imported to know its errors."""
    roots = ((cls.__module__.partition(".")[0], cls.__name__) for cls in type(error).__mro__)
    return [name if root == "builtins" else f"{'httpx' if root == 'httpx2' else root}.{name}" for root, name in roots]


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _overflow(error: BaseException) -> str | None:
    """Compatible endpoints often tell of an overflow in words only."""
    words = r"maximum context length|context (window|length)|prompt is too long"
    return "context_length_exceeded" if _status(error) in (400, 413) and re.search(words, str(error), re.I) else None


def _retry_after(error: BaseException) -> float | None:
    """Seconds asked for by `retry-after-ms` or `Retry-After` (seconds or an HTTP date)."""
    headers = getattr(getattr(error, "response", None), "headers", None)
    if headers is None:
        return None
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif re.fullmatch(r"\s*[\d.]+\s*", text := headers.get("retry-after", "")):
            seconds = float(text)
        else:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return None  # not a number and not a date: as if it had said nothing
    if not math.isfinite(seconds) or seconds > UNBELIEVABLE_S:
        return None
    return min(max(seconds, 0.0), RETRY_AFTER_CAP)


# ------------------------------------------------------------------ words, without secrets

_CREDENTIAL_HEADERS = ("authorization", "proxy-authorization", "cookie", "x-api-key", "api-key")
_CREDENTIAL = re.compile(r"\b(?:sk-[\w*.-]{6,}|Bearer\s+\S+|Basic\s+[\w+/=]{6,})|(?<=://)[^/\s@]+(?=@)")


def _message(error: BaseException, type: ErrorType) -> str:
    response: Any = getattr(error, "response", None)
    if _status(error) is None:
        words = explain(error) if isinstance(error, ValidationError) else str(error)
        name, cause = error.__class__.__name__, error.__cause__.__class__.__name__
        # Client libraries wrap an error into one of the same name.
        name += f" ({cause})" if error.__cause__ is not None and cause != name else ""
        # Ours are written for their reader, most often the model; of others the name says more than the words.
        ours = isinstance(error, ToolRefused | ToolFailed | StoreUnavailable)
        text = words if ours and words else f"{name}: {words}".removesuffix(": ").removesuffix(".")
        if type is ErrorType.INTERNAL and (place := where(error)):
            text = f"{text} ({place})"
    else:
        url = urlsplit(str(response.request.url))
        # Without a user and password, with the port: which of two services on one host it was.
        at = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
        text = f"{response.request.method} {at} answered {response.status_code}"
        # An answer that refuses credentials likes to repeat them.
        body = "" if type is ErrorType.UNAUTHORIZED else _body(error, response)
        text = f"{text}: {body}".removesuffix(": ")
        for header in _CREDENTIAL_HEADERS:
            if sent := response.request.headers.get(header, "").rpartition(" ")[2]:
                text = text.replace(sent, "…")
    text = " ".join(_CREDENTIAL.sub("…", whole(text)).split())
    return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"


def where(error: BaseException) -> str:
    """Where in an agent's code a bug was met: 'agents/expenses/spec.py, line 38'; else where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/agents/" in frame.filename] or frames
    if not own:
        return ""
    name = own[-1].filename
    short = f"agents/{name.rpartition('/agents/')[2]}" if "/agents/" in name else name.rpartition("/")[2]
    return f"{short}, line {own[-1].lineno}"


def _body(error: Any, response: Any) -> str:
    if "openai.APIError" in _names(error):
        text = str((error.body.get("message") if isinstance(error.body, dict) else error.body) or "")
    else:
        try:
            text = _said(response.text)
        except RuntimeError:  # a stream that nobody has read
            text = ""
    return text if len(text) <= BODY_LIMIT else text[:BODY_LIMIT] + "…"


def _said(body: str) -> str:
    """The message in an error body of a usual shape (`{"error": {"message": …}}`, `{"detail": …}`), else all of it."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return body
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) and found else body
