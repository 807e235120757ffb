"""Classifies errors of models and tools, in one table, and computes when to retry.

`classify` turns an exception into a `Failure`; `backoff` returns how long to wait; `application_error` is the only
place that sets `non_retryable` and `next_retry_delay`. Whether `maybe_done` leads to a retry or to "unknown" depends on
the tool's effect class, which is not decided here. `maybe_done` considers only the request that failed. So a tool must
make at most one request with an effect: what an earlier request did is not taken into account.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import ValidationError

from holdfast.contracts.data import whole
from holdfast.contracts.failures import MESSAGE_LIMIT, ErrorType, Failure, ToolFailed, ToolRefused, explain
from holdfast.state.database import StoreUnavailable

if TYPE_CHECKING:
    from temporalio.exceptions import ApplicationError


class Meaning(NamedTuple):
    type: ErrorType
    retry: bool
    maybe_done: bool


# Keys, the most specific first: the error code in the response of a model endpoint; the HTTP status; its status class;
# the code of an MCP error; the exception's name, then its base classes' names. `httpx` stands for httpx2 as well.
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
    "status 302": Meaning(ErrorType.REFUSED, False, True),  # Many services answer a form that they accepted with 302
    "status 303": Meaning(ErrorType.REFUSED, False, True),  # or 303; any other redirect means that nothing was done.
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
    # Arguments are validated before a tool runs, so this is a response that does not fit the tool's own model.
    "pydantic_core.ValidationError": Meaning(ErrorType.BAD_RESPONSE, True, True),
    # Errors of the MCP protocol, by code. A code that the server invented does not say whether anything was done.
    "mcp -32000": Meaning(ErrorType.CONNECTION, True, True),  # the connection closed before the server answered
    "mcp -32001": Meaning(ErrorType.TIMEOUT, True, True),
    "mcp -32042": Meaning(ErrorType.REFUSED, False, False),  # a person has to visit a page first
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
    # A bug: it is not known how far the call got, and a retry would meet the bug again.
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
"""Errors that only the data can cause: not a service that is down, and not a bug that a deploy fixes."""

BODY_LIMIT = 300
RETRY_AFTER_CAP = 300.0
"""Seconds. The longest pause that a service can ask for: one response must not stop all calls for longer."""
IMPLAUSIBLE_S = 86_400.0
"""Seconds. A `Retry-After` of more than a day is taken for an error of the service and ignored."""

RETRIES = 5
"""Retries after the first attempt. Only real failures count."""
FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
JITTER = 0.2


def classify(error: BaseException) -> Failure:
    """Returns the failure that an exception stands for.

    An exception with a `Failure` in its attribute `failure` stands for that one. An exception that the table does not
    list is classified by the cause it was raised `from`, a group of one exception by its member. Raises a cancellation
    again, as it is not a failure.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, asyncio.CancelledError):
        raise error
    declared = getattr(error, "failure", None)
    if isinstance(declared, Failure):
        return declared
    keys = (key for link in _chain(error) for key in _keys(link))
    meaning = next((TABLE[key] for key in keys if key in TABLE), TABLE["BaseException"])
    wait = _retry_after(error) if meaning.retry else None
    return Failure(meaning.type, _message(error, meaning.type), meaning.retry, meaning.maybe_done, wait)


def hopeless(error: BaseException) -> bool:
    """Whether the error depends on the data alone, so that a retry cannot help."""
    return any(name in BAD_DATA for link in _chain(error) for name in _names(link))


def backoff(failures: int, retry_after: float | None, jitter: float, longest: float = LONGEST_DELAY) -> float:
    """Returns the seconds to wait after failure number `failures` (from 1).

    The delay starts at 0.5 s, doubles up to `longest`, varies by ±20 %, and is never shorter than `retry_after`.

    jitter: a random number in [0, 1).
    """
    steps = min(max(failures, 1), 16) - 1  # `longest` is reached long before; keeps the power small
    delay = min(longest, FIRST_DELAY * 2**steps) * (1 - JITTER + 2 * JITTER * jitter)
    return max(delay, retry_after or 0.0)


def application_error(failure: Failure, delay: float | None) -> ApplicationError:
    """Returns the error that the activity raises. delay: in seconds; None leaves it to the retry policy."""
    from temporalio.exceptions import ApplicationError

    return ApplicationError(
        failure.message,
        type=failure.type.value,
        non_retryable=not failure.retry,
        next_retry_delay=None if delay is None else timedelta(seconds=delay),
    )


# ------------------------------------------------------------------ from an exception to its keys in the table


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields the error and its causes, without openai's wrapper, which hides the transport error that matters."""
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
            yield f"status {code}"  # some gateways put the status there in an error event
    if "mcp.MCPError" in names:
        yield f"mcp {getattr(error, 'code', None)}"
    status = _status(error)
    if status is not None:
        yield f"status {status}"
        yield f"status {status // 100}xx"
    yield from (name for name in names if name != "BaseException")


def _names(error: BaseException) -> list[str]:
    """Returns the names of the exception's classes, so that no client library has to be imported."""
    roots = ((cls.__module__.partition(".")[0], cls.__name__) for cls in type(error).__mro__)
    return [name if root == "builtins" else f"{'httpx' if root == 'httpx2' else root}.{name}" for root, name in roots]


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _overflow(error: BaseException) -> str | None:
    """Detects a context overflow by its text: many compatible endpoints send no error code for it."""
    words = r"maximum context length|context (window|length)|prompt is too long"
    return "context_length_exceeded" if _status(error) in (400, 413) and re.search(words, str(error), re.I) else None


def _retry_after(error: BaseException) -> float | None:
    """Returns the seconds in `retry-after-ms` or `Retry-After` (seconds or an HTTP date), if there are any."""
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
        return None  # neither a number nor a date: ignored
    if not math.isfinite(seconds) or seconds > IMPLAUSIBLE_S:
        return None
    return min(max(seconds, 0.0), RETRY_AFTER_CAP)


# ------------------------------------------------------------------ the message, without secrets

_CREDENTIAL_HEADERS = ("authorization", "proxy-authorization", "cookie", "x-api-key", "api-key")
_CREDENTIAL = re.compile(r"\b(?:sk-[\w*.-]{6,}|Bearer\s+\S+|Basic\s+[\w+/=]{6,})|(?<=://)[^/\s@]+(?=@)")


def _message(error: BaseException, type: ErrorType) -> str:
    response: Any = getattr(error, "response", None)
    if _status(error) is None:
        words = explain(error) if isinstance(error, ValidationError) else str(error)
        name, cause = error.__class__.__name__, error.__cause__.__class__.__name__
        # Client libraries wrap an error into one of the same name.
        name += f" ({cause})" if error.__cause__ is not None and cause != name else ""
        # Our own messages are written for the reader, usually the model. For other errors, the class name helps more.
        ours = isinstance(error, ToolRefused | ToolFailed | StoreUnavailable)
        text = words if ours and words else f"{name}: {words}".removesuffix(": ").removesuffix(".")
        if type is ErrorType.INTERNAL and (place := where(error)):
            text = f"{text} ({place})"
    else:
        url = urlsplit(str(response.request.url))
        # Without user and password, but with the port, which distinguishes two services on one host.
        at = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
        text = f"{response.request.method} {at} answered {response.status_code}"
        # A response that refuses credentials often repeats them.
        body = "" if type is ErrorType.UNAUTHORIZED else _body(error, response)
        text = f"{text}: {body}".removesuffix(": ")
        for header in _CREDENTIAL_HEADERS:
            if sent := response.request.headers.get(header, "").rpartition(" ")[2]:
                text = text.replace(sent, "…")
    text = " ".join(_CREDENTIAL.sub("…", whole(text)).split())
    return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"


def where(error: BaseException) -> str:
    """Returns the place in an agent's code, such as 'agents/expenses/spec.py, line 38', else where it was raised."""
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
            text = _error_text(response.text)
        except RuntimeError:  # a stream that was not read
            text = ""
    return text if len(text) <= BODY_LIMIT else text[:BODY_LIMIT] + "…"


def _error_text(body: str) -> str:
    """Returns the message from a usual error body (`{"error": {"message": …}}`, `{"detail": …}`), else the body."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return body
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) and found else body
