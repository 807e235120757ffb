"""Every line of the table of errors, produced for real: sockets, HTTP clients, drivers."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sqlite3
import ssl
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import anyio
import httpx
import httpx2
import openai
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp import Client
from pydantic import BaseModel

from holdfast.contracts.failures import MESSAGE_LIMIT, ErrorType, Failure, ToolFailed, ToolRefused
from holdfast.ext.mcp.connection import Connection
from holdfast.ext.mcp.spec import McpServer
from holdfast.reliability.errors import LONGEST_DELAY, RETRY_AFTER_CAP, TABLE, application_error, backoff, classify
from holdfast.state.opening import open_database
from tests.fixtures.wire import STREAM, Step, Then, answer, event, free_port, wire
from tests.integration.mcp.conftest import Notebook, stdio
from tests.integration.mcp.server import make as make_notebook

KEY = "4f1c0ffee-of-a-shape-unknown"
Act = Callable[[], Awaitable[Any]]

ACTS: list[tuple[str, ErrorType, bool, bool, str, Act]] = []
"""Line of the table, type, retry, maybe done, what happens, and the act that fails so."""


def case(line: str, type: ErrorType, *, retry: bool, maybe_done: bool, name: str = "") -> Callable[[Act], Act]:
    def add(act: Act) -> Act:
        ACTS.append((line, type, retry, maybe_done, name or act.__name__, act))
        return act

    return add


async def get(*steps: Step, client: Any = httpx2, url: str = "", **options: Any) -> Any:
    """One POST, with a short read timeout, to a server that plays the steps."""
    options.setdefault("timeout", client.Timeout(5, read=0.2))
    async with wire(*steps) as server, client.AsyncClient(**options) as http:
        response = await http.post(url or f"{server.url}/orders?token=hidden", headers={"Authorization": KEY})
        response.raise_for_status()
        return response


def model_client(url: str, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key=KEY, base_url=url, max_retries=0, **options)


async def ask(*steps: Step, **options: Any) -> Any:
    """One chat completion with the openai client."""
    options.setdefault("timeout", 5)
    stream = steps[0].startswith(STREAM) if isinstance(steps[0], bytes) else False
    async with wire(*steps) as server, model_client(server.url, **options) as client:
        done = await client.chat.completions.create(model="m", messages=[], stream=stream)
        return [chunk async for chunk in done] if isinstance(done, openai.AsyncStream) else done


# ------------------------------------------------------------------ answers with a status

STATUSES: list[tuple[str, ErrorType, bool, bool, list[int]]] = [
    ("status 3xx", ErrorType.REFUSED, False, False, [301, 307, 308]),
    ("status 302", ErrorType.REFUSED, False, True, [302]),
    ("status 303", ErrorType.REFUSED, False, True, [303]),
    ("status 401", ErrorType.UNAUTHORIZED, False, False, [401]),
    ("status 402", ErrorType.UNAUTHORIZED, False, False, [402]),
    ("status 403", ErrorType.UNAUTHORIZED, False, False, [403]),
    ("status 4xx", ErrorType.REFUSED, False, False, [400, 404, 409, 410, 413, 415, 422]),
    ("status 408", ErrorType.TIMEOUT, True, True, [408]),
    ("status 425", ErrorType.RATE_LIMITED, True, False, [425]),
    ("status 429", ErrorType.RATE_LIMITED, True, False, [429]),
    ("status 5xx", ErrorType.UNAVAILABLE, True, True, [500, 502, 503, 504, 529]),
    ("status 501", ErrorType.REFUSED, False, False, [501]),
]


def answered(status: int, call: Callable[..., Awaitable[Any]], **options: Any) -> Act:
    return lambda: call(answer(status, {"error": {"message": "no"}}), **options)


for _line, _type, _retry, _maybe_done, _statuses in STATUSES:
    for _status in _statuses:
        for _name, _act in {
            "httpx2": answered(_status, get),
            "httpx": answered(_status, get, client=httpx),
            "openai": answered(_status, ask),
        }.items():
            case(_line, _type, retry=_retry, maybe_done=_maybe_done, name=f"{_status} {_name}")(_act)

# ------------------------------------------------------------------ model endpoints say more in a code


def coded(status: int, error: dict[str, Any]) -> Act:
    async def act() -> Any:
        return await ask(answer(status, {"error": error}))

    return act


_OVER = ErrorType.CONTEXT_OVERFLOW
_POLICY = ErrorType.CONTENT_POLICY
for _name, _code, _type, _status, _error in [
    ("overflow", "context_length_exceeded", _OVER, 400, {"code": "context_length_exceeded"}),
    ("overflow in words", "context_length_exceeded", _OVER, 400, {"message": "the maximum context length is 8192"}),
    ("filter", "content_filter", _POLICY, 400, {"code": "content_filter"}),
    ("policy", "content_policy_violation", _POLICY, 400, {"code": "content_policy_violation"}),
    ("quota", "insufficient_quota", ErrorType.UNAUTHORIZED, 429, {"code": "insufficient_quota"}),
]:
    case(f"code {_code}", _type, retry=False, maybe_done=False, name=_name)(coded(_status, _error))


@case("code rate_limit_exceeded", ErrorType.RATE_LIMITED, retry=True, maybe_done=False)
async def limited_inside_a_stream() -> None:
    await ask(STREAM + event({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}))


@case("status 429", ErrorType.RATE_LIMITED, retry=True, maybe_done=False)
async def limited_inside_a_stream_by_number() -> None:
    await ask(STREAM + event({"error": {"message": "slow down", "code": 429}}))


@case("openai.APIError", ErrorType.UNAVAILABLE, retry=True, maybe_done=True)
async def error_inside_a_stream() -> None:
    await ask(STREAM + event({"error": {"message": "the server had an error", "type": "server_error"}}))


@case("openai.APIResponseValidationError", ErrorType.BAD_RESPONSE, retry=True, maybe_done=True)
async def answer_that_is_no_completion() -> None:
    await ask(answer(200, b"<html>", "text/html"), _strict_response_validation=True)


# ------------------------------------------------------------------ transport


@contextmanager
def full_listener() -> Iterator[int]:
    """A port whose queue of connections is full: the next connect gets no answer at all."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", port))
        try:
            yield port
        finally:
            for each in waiting:
                each.close()


for _client in (httpx2, httpx):
    _unreachable = {"retry": True, "maybe_done": False}

    @case("httpx.ConnectError", ErrorType.UNREACHABLE, **_unreachable, name=f"nobody listens {_client.__name__}")
    async def _(client: Any = _client) -> None:
        await get(client=client, url=f"http://127.0.0.1:{free_port()}")

    @case("httpx.ConnectTimeout", ErrorType.UNREACHABLE, **_unreachable, name=f"connect timeout {_client.__name__}")
    async def _(client: Any = _client) -> None:
        with full_listener() as port:
            await get(client=client, url=f"http://127.0.0.1:{port}", timeout=0.2)

    @case("httpx.PoolTimeout", ErrorType.UNREACHABLE, **_unreachable, name=f"pool timeout {_client.__name__}")
    async def _(client: Any = _client) -> None:
        options = {"limits": client.Limits(max_connections=1), "timeout": client.Timeout(5, pool=0.1)}
        async with wire(Then.HANG) as server, client.AsyncClient(**options) as http, asyncio.TaskGroup() as group:
            first = group.create_task(http.get(server.url))
            await server.asked.wait()
            try:
                await http.get(server.url)
            finally:
                first.cancel()

    @case("httpx.TimeoutException", ErrorType.TIMEOUT, retry=True, maybe_done=True, name=f"hangs {_client.__name__}")
    async def _(client: Any = _client) -> None:
        await get(Then.HANG, client=client)

    @case("httpx.TransportError", ErrorType.CONNECTION, retry=True, maybe_done=True, name=f"reset {_client.__name__}")
    async def _(client: Any = _client) -> None:
        await get(Then.RESET, client=client)

    @case("httpx.TransportError", ErrorType.CONNECTION, retry=True, maybe_done=True, name=f"closed {_client.__name__}")
    async def _(client: Any = _client) -> None:
        await get(Then.CLOSE, client=client)

    @case("httpx.TransportError", ErrorType.CONNECTION, retry=True, maybe_done=True, name=f"cut {_client.__name__}")
    async def _(client: Any = _client) -> None:
        await get(answer(200, b"x" * 100)[:-50], Then.CLOSE, client=client)


@case("httpx.TimeoutException", ErrorType.TIMEOUT, retry=True, maybe_done=True)
async def write_timeout() -> None:
    with socket.socket() as listener:  # accepts nothing, so that the buffers fill up
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        async with httpx2.AsyncClient(timeout=httpx2.Timeout(5, write=0.1)) as http:
            await http.post(f"http://127.0.0.1:{listener.getsockname()[1]}", content=b"x" * 20_000_000)


@case("httpx.ProxyError", ErrorType.UNREACHABLE, retry=True, maybe_done=False)
async def proxy_refuses() -> None:
    async with wire(answer(503)) as proxy:
        await get(url="https://nowhere.invalid/", proxy=proxy.url)


@case("httpx.LocalProtocolError", ErrorType.INTERNAL, retry=False, maybe_done=True)
async def illegal_header() -> None:
    async with wire(answer(200)) as server, httpx2.AsyncClient() as http:
        await http.get(server.url, headers={"X": "a\nb"})


@case("httpx.DecodingError", ErrorType.BAD_RESPONSE, retry=True, maybe_done=True)
async def broken_compression() -> None:
    await get(answer(200, b"not gzip", content_encoding="gzip"))


@case("httpx.TooManyRedirects", ErrorType.REFUSED, retry=False, maybe_done=True)
async def redirects_forever() -> None:
    await get(answer(307, location="/again"), follow_redirects=True)


@case("httpx.UnsupportedProtocol", ErrorType.INTERNAL, retry=False, maybe_done=False)
async def no_such_protocol() -> None:
    await get(url="ftp://127.0.0.1/")


@case("httpx.InvalidURL", ErrorType.INTERNAL, retry=False, maybe_done=False)
async def no_url() -> None:
    await get(url="http://127.0.0.1:port/")


@case("httpx.ConnectError", ErrorType.UNREACHABLE, retry=True, maybe_done=False)
async def openai_nobody_listens() -> None:
    async with model_client(f"http://127.0.0.1:{free_port()}") as client:
        await client.chat.completions.create(model="m", messages=[])


@case("httpx.ConnectTimeout", ErrorType.UNREACHABLE, retry=True, maybe_done=False)
async def openai_connect_timeout() -> None:
    with full_listener() as port:
        async with model_client(f"http://127.0.0.1:{port}", timeout=0.2) as client:
            await client.chat.completions.create(model="m", messages=[])


@case("httpx.TimeoutException", ErrorType.TIMEOUT, retry=True, maybe_done=True)
async def openai_hangs() -> None:
    await ask(Then.HANG, timeout=0.2)


@case("httpx.TransportError", ErrorType.CONNECTION, retry=True, maybe_done=True)
async def openai_reset() -> None:
    await ask(Then.RESET)


@case("httpx.TransportError", ErrorType.CONNECTION, retry=True, maybe_done=True)
async def openai_reset_inside_a_stream() -> None:
    await ask(STREAM + event({"choices": []}), Then.RESET)


# ------------------------------------------------------------------ plain Python


@case("TimeoutError", ErrorType.TIMEOUT, retry=True, maybe_done=True)
async def timeout_of_the_tool() -> None:
    async with asyncio.timeout(0.1):
        await get(Then.HANG, timeout=None)


@case("ConnectionRefusedError", ErrorType.UNREACHABLE, retry=True, maybe_done=False)
async def socket_refused() -> None:
    with socket.create_connection(("127.0.0.1", free_port())):
        pass


@case("socket.gaierror", ErrorType.UNREACHABLE, retry=True, maybe_done=False)
async def name_lookup() -> None:
    await asyncio.open_connection("127.0.0.1", "no-such-service")  # pyright: ignore[reportArgumentType]


@case("ConnectionError", ErrorType.CONNECTION, retry=True, maybe_done=True)
async def socket_reset() -> None:
    async with wire(b"x", Then.RESET) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(b"\r\n\r\n")
            await reader.read(-1)
        finally:
            writer.close()


@case("ssl.SSLError", ErrorType.CONNECTION, retry=True, maybe_done=True)
async def no_tls_there() -> None:
    async with wire(b"plain text\r\n", greets=True) as server:
        await asyncio.open_connection("127.0.0.1", server.port, ssl=ssl.create_default_context())


@case("anyio.EndOfStream", ErrorType.CONNECTION, retry=True, maybe_done=True)
async def end_of_stream() -> None:
    async with wire(Then.CLOSE, greets=True) as server, await anyio.connect_tcp("127.0.0.1", server.port) as stream:
        await stream.receive()


class Order(BaseModel):
    id: int


@case("json.JSONDecodeError", ErrorType.BAD_RESPONSE, retry=True, maybe_done=True)
async def broken_json() -> None:
    (await get(answer(200, b'{"id": '))).json()


@case("UnicodeDecodeError", ErrorType.BAD_RESPONSE, retry=True, maybe_done=True)
async def broken_text() -> None:
    (await get(answer(200, b'"\xff"'))).content.decode()


@case("pydantic_core.ValidationError", ErrorType.BAD_RESPONSE, retry=True, maybe_done=True)
async def answer_of_another_shape() -> None:
    Order.model_validate_json((await get(answer(200, {"id": "none"}))).content)


@case("sqlite3.OperationalError", ErrorType.UNAVAILABLE, retry=True, maybe_done=True)
async def database_locked() -> None:
    url = "file:locked?mode=memory&cache=shared"
    with sqlite3.connect(url, uri=True) as one, sqlite3.connect(url, uri=True, timeout=0) as two:
        one.execute("BEGIN IMMEDIATE")
        two.execute("BEGIN IMMEDIATE")


@case("psycopg.OperationalError", ErrorType.UNAVAILABLE, retry=True, maybe_done=True)
async def database_gone() -> None:
    await psycopg.AsyncConnection.connect(f"postgresql://u:secret@127.0.0.1:{free_port()}/d")


@case("holdfast.StoreUnavailable", ErrorType.UNAVAILABLE, retry=True, maybe_done=True)
async def store_gone() -> None:
    await open_database(f"postgresql://u:secret@127.0.0.1:{free_port()}/d")


@case("holdfast.ToolRefused", ErrorType.REFUSED, retry=False, maybe_done=False)
async def tool_refuses() -> None:
    raise ToolRefused("no such patient")


@case("holdfast.ToolFailed", ErrorType.TOOL_FAILED, retry=False, maybe_done=False)
async def tool_fails() -> None:
    raise ToolFailed("out of stock")


@case("BaseException", ErrorType.INTERNAL, retry=False, maybe_done=True)
async def bug() -> None:
    raise KeyError("patient")


@case("httpx.ConnectError", ErrorType.UNREACHABLE, retry=True, maybe_done=False)
async def wrapped_by_a_client_library() -> None:
    try:
        await openai_nobody_listens()
    except openai.APIConnectionError as error:
        raise RuntimeError("the library's own error") from error


async def failure_of(act: Act) -> Failure:
    try:
        await act()
    except Exception as error:  # noqa: BLE001 - any error is what is under test
        return classify(error)
    raise AssertionError("nothing failed")


# ------------------------------------------------------------------ MCP servers


def protests(code: int) -> Act:
    async def act() -> None:
        async with Client(make_notebook(Path(os.devnull)), mode="legacy") as client:
            await client.call_tool("protest", {"code": code})

    return act


for _line, _type, _retry, _maybe_done, _code in [
    ("mcp -32042", ErrorType.REFUSED, False, False, -32042),
    ("mcp -32600", ErrorType.REFUSED, False, False, -32600),
    ("mcp -32601", ErrorType.REFUSED, False, False, -32601),
    ("mcp -32602", ErrorType.REFUSED, False, False, -32602),
    ("mcp -32603", ErrorType.UNAVAILABLE, True, True, -32603),
    ("mcp -32700", ErrorType.BAD_RESPONSE, True, True, -32700),
    ("mcp -32001", ErrorType.TIMEOUT, True, True, -32001),
    ("mcp.MCPError", ErrorType.REFUSED, False, True, -31999),
]:
    case(_line, _type, retry=_retry, maybe_done=_maybe_done, name=f"{_code}")(protests(_code))


async def over_stdio(tool: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebook = Notebook(Path(folder) / "journal", stdio(Path(folder) / "journal"))
        connection = notebook.connection()
        try:
            await notebook.call(connection, tool)
        finally:
            await connection.close()


@case("mcp -32000", ErrorType.CONNECTION, retry=True, maybe_done=True)
async def mcp_server_dies_in_the_call() -> None:
    await over_stdio("die")


@case("holdfast.BadAnswer", ErrorType.BAD_RESPONSE, retry=True, maybe_done=True)
async def mcp_result_that_does_not_fit_its_schema() -> None:
    await over_stdio("lie")


@case("holdfast.ServerDown", ErrorType.UNREACHABLE, retry=True, maybe_done=False)
async def mcp_server_that_does_not_start() -> None:
    await Connection(McpServer("absent", command=("no-such-command",))).tools(20)


CASES = [pytest.param(*c[:4], c[5], id=f"{c[0]}: {c[4]}") for c in ACTS]


@pytest.mark.parametrize(("line", "type", "retry", "maybe_done", "act"), CASES)
async def test_line_of_the_table(line: str, type: ErrorType, retry: bool, maybe_done: bool, act: Act) -> None:
    failure = await failure_of(act)

    assert (failure.type, failure.retry, failure.maybe_done) == (type, retry, maybe_done)
    assert failure.message and "\n" not in failure.message and len(failure.message) <= MESSAGE_LIMIT
    assert "hidden" not in failure.message and KEY not in failure.message


def test_every_line_of_the_table_is_tested() -> None:
    assert {case[0] for case in ACTS} == set(TABLE)


async def test_group_of_one_is_judged_by_its_member() -> None:
    async def act() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(get(answer(429)))

    assert (await failure_of(act)).type is ErrorType.RATE_LIMITED


# ------------------------------------------------------------------ words


async def test_message_names_the_request_and_quotes_a_little_of_the_answer() -> None:
    failure = await failure_of(lambda: get(answer(409, b"x" * 10_000)))

    assert re.match(r"POST http://127\.0\.0\.1:\d+/orders answered 409: xxx", failure.message)
    assert len(failure.message) <= MESSAGE_LIMIT


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "closed for today", "code": null}}', "closed for today"),
        (b'{"error": "closed for today"}', "closed for today"),
        (b'{"detail": "closed for today"}', "closed for today"),
        (b'{"detail": {"code": 7}}', '{"detail": {"code": 7}}'),
        (b"[" * 100_000, "[" * 20),
        (b'{"error": {"message": cut', '{"error": {"message": cut'),
    ],
    ids=["nested", "flat", "detail", "no words", "deep", "broken"],
)
async def test_of_an_answer_in_json_its_message_is_quoted(body: bytes, words: str) -> None:
    failure = await failure_of(lambda: get(answer(409, body)))

    found = re.match(r"POST http://127\.0\.0\.1:\d+/orders answered 409: ", failure.message)
    assert found
    assert failure.message[found.end() :].startswith(words)


@pytest.mark.parametrize("status", [400, 401, 500])
async def test_credentials_that_the_answer_repeats_are_left_out(status: int) -> None:
    error = {"error": {"message": f"key {KEY} is wrong"}}

    for act in (lambda: get(answer(status, error)), lambda: ask(answer(status, error))):
        failure = await failure_of(act)
        assert KEY not in failure.message and "answered" in failure.message


@pytest.mark.parametrize("text", ["Bearer abcdef", "sk-abcdef123", "postgresql://u:pw@h/db"])
def test_credentials_in_any_error_are_left_out(text: str) -> None:
    message = classify(ValueError(f"failed with {text}")).message

    assert "…" in message and not any(secret in message for secret in ("abcdef", "u:pw"))


def test_what_a_tool_says_reaches_its_reader_unchanged() -> None:
    assert classify(ToolRefused("no such patient: pat-9")).message == "no such patient: pat-9"


def test_input_values_are_not_repeated() -> None:
    with pytest.raises(ValueError) as caught:
        Order.model_validate({"id": "Jane Doe"})

    assert classify(caught.value).message.startswith("ValidationError: id: ")
    assert "Jane" not in classify(caught.value).message


# ------------------------------------------------------------------ an error that speaks for itself, and cancellation


def test_error_that_carries_a_failure_is_taken_at_its_word() -> None:
    failure = Failure(ErrorType.KEY_CONFLICT, "the same key with other arguments")
    error = RuntimeError()
    error.failure = failure  # pyright: ignore[reportAttributeAccessIssue]

    assert classify(error) is failure


def test_cancellation_is_not_a_failure() -> None:
    with pytest.raises(asyncio.CancelledError):
        classify(asyncio.CancelledError())


# ------------------------------------------------------------------ waiting


async def after(**headers: str) -> float | None:
    return (await failure_of(lambda: get(answer(429, **headers)))).retry_after


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        ("1.5", 1.5),
        ("0", 0),
        ("80000", RETRY_AFTER_CAP),
        ("99999999", None),
        ("1" * 400, None),
        ("soon", None),
        ("-5", None),
        ("1.2.3", None),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0),
    ],
)
async def test_retry_after(header: str, seconds: float | None) -> None:
    assert await after(retry_after=header) == seconds


async def test_retry_after_as_a_date() -> None:
    at = datetime.now(UTC) + timedelta(seconds=60)

    seconds = await after(retry_after=format_datetime(at, usegmt=True))

    assert seconds is not None and 50 < seconds <= 60


async def test_retry_after_in_milliseconds_is_the_more_precise() -> None:
    assert await after(retry_after="1", retry_after_ms="250") == 0.25


async def test_openai_errors_tell_retry_after_too() -> None:
    assert (await failure_of(lambda: ask(answer(503, retry_after="4")))).retry_after == 4


async def test_what_is_not_retried_has_no_retry_after() -> None:
    assert (await failure_of(lambda: get(answer(400, retry_after="4")))).retry_after is None


jitters = st.floats(0, 1, exclude_max=True)


@given(st.integers(1, 10_000), jitters)
def test_backoff_doubles_to_a_cap_within_the_jitter(failures: int, jitter: float) -> None:
    plain = min(LONGEST_DELAY, 0.5 * 2 ** min(failures - 1, 50))

    assert 0.8 * plain - 1e-9 <= backoff(failures, None, jitter) <= 1.2 * plain + 1e-9


@given(st.integers(1, 100), jitters)
def test_backoff_spreads_over_the_whole_jitter(failures: int, jitter: float) -> None:
    assert backoff(failures, None, 0) <= backoff(failures, None, jitter)
    assert backoff(failures, None, 0.999) / backoff(failures, None, 0) == pytest.approx(1.5, rel=0.01)


@given(st.integers(1, 100), st.floats(0, RETRY_AFTER_CAP), jitters)
def test_retry_after_wins_when_longer(failures: int, retry_after: float, jitter: float) -> None:
    own = backoff(failures, None, jitter)

    assert backoff(failures, retry_after, jitter) == max(own, retry_after)


def test_first_delays() -> None:
    assert [backoff(n, None, 0.5) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


# ------------------------------------------------------------------ what Temporal is told


def test_application_error() -> None:
    retried = application_error(Failure(ErrorType.RATE_LIMITED, "slow down", retry=True), 2.5)
    final = application_error(Failure(ErrorType.UNAUTHORIZED, "no"), None)

    assert (retried.type, retried.non_retryable, retried.next_retry_delay) == (
        "rate_limited",
        False,
        timedelta(seconds=2.5),
    )
    assert (final.type, final.non_retryable, final.next_retry_delay) == ("unauthorized", True, None)
    assert str(retried).endswith("slow down")
