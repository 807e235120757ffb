"""What each failure makes of each kind of call, over real HTTP: real calls, seconds of waiting, and how it ends.

The requirement: 429, 500, 502, 503, 504, timeouts and dropped connections are tried again, 5 times, after 0.5 s doubled
(15.5 s in all, ±20 %), or after what `Retry-After` says when that is longer. 400, 401, 403 and their like are not.
What may have happened is never repeated blindly: a tool of class `probe` asks first, one of class `manual` leaves it
unknown.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
from pydantic import SecretStr
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.model import Wanted, ask_model
from activities.tools import Tools
from holdfast.authoring.tools import Tool, ToolContext, tool
from holdfast.contracts.failures import ErrorType
from holdfast.contracts.profile import Effect
from holdfast.contracts.tool_call import ToolRequest
from holdfast.engine.runtime import Runtime, open_runtime
from holdfast.reasoning.answers import ModelUnavailable
from holdfast.reliability.breaker import TRIPS
from holdfast.reliability.chain import RetryLater
from holdfast.reliability.waiting import NotYet
from holdfast.settings import Settings
from tests.fixtures.clock import Ahead
from tests.fixtures.wire import END, STREAM, Step, Then, Wire, answer, event, free_port, wire
from tests.fixtures.world import agent

# Each cell: real calls (for `probe`: effects + questions whether it happened), seconds of waiting, end. The end of a
# model call is its type of failure, that of a tool call its status.
TABLE = """
fault           | model                 | read           | idempotent      | probe             | manual
400             | 1 0    refused        | 1 0    error   | 1 0    error    | 1+0 0    error    | 1 0    error
401             | 1 0    unauthorized   | 1 0    failed  | 1 0    failed   | 1+0 0    failed   | 1 0    failed
402             | 1 0    unauthorized   | 1 0    failed  | 1 0    failed   | 1+0 0    failed   | 1 0    failed
403             | 1 0    unauthorized   | 1 0    failed  | 1 0    failed   | 1+0 0    failed   | 1 0    failed
404             | 1 0    refused        | 1 0    error   | 1 0    error    | 1+0 0    error    | 1 0    error
408             | 6 15.5 timeout        | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
409             | 1 0    refused        | 1 0    error   | 1 0    error    | 1+0 0    error    | 1 0    error
413             | 1 0    refused        | 1 0    error   | 1 0    error    | 1+0 0    error    | 1 0    error
422             | 1 0    refused        | 1 0    error   | 1 0    error    | 1+0 0    error    | 1 0    error
425             | 6 15.5 rate_limited   | 6 15.5 failed  | 6 15.5 failed   | 6+0 15.5 failed   | 6 15.5 failed
429             | 6 15.5 rate_limited   | 6 15.5 failed  | 6 15.5 failed   | 6+0 15.5 failed   | 6 15.5 failed
429 after 40 s  | 6 200  rate_limited   | 6 200  failed  | 6 200  failed   | 6+0 200  failed   | 6 200  failed
500             | 6 15.5 unavailable    | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
501             | 1 0    refused        | 1 0    error   | 1 0    error    | 1+0 0    error    | 1 0    error
502             | 6 15.5 unavailable    | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
503             | 6 15.5 unavailable    | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
503 after 40 s  | 6 200  unavailable    | 6 200  failed  | 6 200  unknown  | 1+5 200  unknown  | 1 0    unknown
504             | 6 15.5 unavailable    | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
301             | 1 0    refused        | 1 0    error   | 1 0    error    | 1+0 0    error    | 1 0    error
302             | 1 0    refused        | 1 0    error   | 1 0    unknown  | 1+5 15.5 unknown  | 1 0    unknown
303             | 1 0    refused        | 1 0    error   | 1 0    unknown  | 1+5 15.5 unknown  | 1 0    unknown
307             | 1 0    refused        | 1 0    error   | 1 0    error    | 1+0 0    error    | 1 0    error
too long        | 1 0  context_overflow |                |                 |                   |
policy          | 1 0  content_policy   |                |                 |                   |
refused         | 6 15.5 unreachable    | 6 15.5 failed  | 6 15.5 failed   | 6+0 15.5 failed   | 6 15.5 failed
reset           | 6 15.5 connection     | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
no answer       | 6 15.5 timeout        | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
closed          | 6 15.5 connection     | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
cut off         | 6 15.5 connection     | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
ends too early  | 6 15.5 bad_response   | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
broken JSON     | 6 15.5 bad_response   | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
wrong type      | 6 15.5 bad_response   | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
empty body      | 6 15.5 bad_response   | 6 15.5 failed  | 6 15.5 unknown  | 1+5 15.5 unknown  | 1 0    unknown
"""

_WORD = event({"choices": [{"index": 0, "delta": {"content": "Dis"}}]})
_PAGE = answer(200, b"<html>welcome</html>", "text/html")
_CUT: list[Step] = [answer(200, {"order": 7})[:-4], Then.CLOSE]
FAULTS: dict[str, tuple[list[Step], list[Step]]] = {
    "too long": ([answer(400, {"error": {"message": "no", "code": "context_length_exceeded"}})], []),
    "policy": ([answer(400, {"error": {"message": "no", "code": "content_policy_violation"}})], []),
    "reset": ([Then.RESET], [Then.RESET]),
    "no answer": ([Then.HANG], [Then.HANG]),
    "closed": ([Then.CLOSE], [Then.CLOSE]),
    "cut off": ([STREAM + _WORD, Then.CLOSE], _CUT),
    "ends too early": ([STREAM + _WORD + END], [answer(200, b'{"order":')]),
    "broken JSON": ([STREAM + event('{"choices": [') + END], [answer(200, b'{"order": 7]}')]),
    "wrong type": ([_PAGE], [_PAGE]),
    "empty body": ([STREAM + END], [answer(200)]),
}
"""What the server does to a model call and to a tool call; the other faults are statuses, for both the same."""


def steps_of(fault: str, kind: str) -> list[Step]:
    if fault in FAULTS:
        return FAULTS[fault][kind != "model"]
    status, _, after = fault.partition(" after ")
    headers = {"retry_after": after.removesuffix(" s")} if after else {}
    if status.startswith("3"):
        headers["location"] = "/elsewhere"
    return [answer(int(status), {"error": {"message": "no"}}, **headers)]


class End(NamedTuple):
    calls: int
    probes: int
    wait: float
    state: str


def rows() -> list[Any]:
    """The cells of the table as cases of a test."""
    head, *lines = [[cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines()]
    cases = []
    for fault, *cells in lines:
        for kind, cell in zip(head[1:], cells, strict=True):
            if cell:
                calls, wait, state = cell.split()
                acts, _, probes = calls.partition("+")
                end = End(int(acts), int(probes or 0), float(wait), state)
                cases.append(pytest.param(fault, kind, end, id=f"{fault} {kind}"))
    return cases


@dataclass
class Driver:
    """Does what the server does with an activity: calls again when it is told to, and never sleeps for it."""

    clock: Ahead
    retries: float = 0.0
    """Seconds asked for between tries."""
    breaker: float = 0.0
    """Seconds that an open breaker kept it waiting; no try is used up by them."""

    async def drive(self, attempt: Callable[[], Awaitable[str | timedelta]]) -> str:
        """attempt: one try; how it ended, or how long the breaker lets it wait."""
        for _ in range(30):
            try:
                ended = await attempt()
            except (RetryLater, ApplicationError) as later:
                delay = later.delay if isinstance(later, RetryLater) else _delay(later)
                self.retries += delay
                self.clock.seconds += delay
                continue
            if isinstance(ended, str):
                return ended
            self.breaker += ended.total_seconds()
            self.clock.seconds += ended.total_seconds()
        raise AssertionError("it goes on and on")


def _delay(error: ApplicationError) -> float:
    assert error.next_retry_delay is not None
    assert not error.non_retryable
    return error.next_retry_delay.total_seconds()


SILENT_S, PATIENT_S = 0.5, 20.0
"""The timeout where the server does not answer, and elsewhere: a busy machine must not run into it."""


@asynccontextmanager
async def running(store_url: str, model_url: str, timeout_s: float = PATIENT_S) -> AsyncIterator[Runtime]:
    runtime = await open_runtime(
        Settings(
            database_url=store_url,
            openai_base_url=f"{model_url}/v1",
            openai_api_key=SecretStr("test"),
            model="fake-1",
            model_first_token_s=timeout_s,
        )
    )
    try:
        yield runtime
    finally:
        await runtime.close()


def posting(effect: Effect, timeout_s: float) -> Tool:
    """A tool that posts, and asks with a GET whether it happened."""

    bound = None if effect is Effect.READ else 0.0

    @tool(effect=effect, service="wire", timeout=timeout_s, name=f"post_{effect}", settles_within=bound)
    async def post(ctx: ToolContext, url: str) -> Any:
        """Post."""
        return (await ctx.http.post(url)).raise_for_status().json()

    if effect is Effect.PROBE:

        @post.probe
        async def there(ctx: ToolContext, url: str) -> Any:
            return (await ctx.http.get(url)).raise_for_status().json()

    return post


@pytest.mark.parametrize(("fault", "kind", "expected"), rows())
async def test_how_often_it_is_called_how_long_it_waits_and_how_it_ends(
    sqlite_url: str, fault: str, kind: str, expected: End
) -> None:
    async with wire(*([] if fault == "refused" else steps_of(fault, kind))) as server:
        url = f"http://127.0.0.1:{free_port()}" if fault == "refused" else server.url
        timeout_s = SILENT_S if fault == "no answer" else PATIENT_S
        async with running(sqlite_url, url, timeout_s) as runtime:
            driver = Driver(Ahead(runtime.db, runtime.guards))
            attempt = asking(runtime) if kind == "model" else calling(runtime, posting(Effect(kind), timeout_s), url)
            state = await driver.drive(attempt)
            row = await runtime.ledger.entry("wf/run/1")
            assert row is not None
            failed = [line["error"].partition(":")[0] for line in row.log]
    if fault == "refused":
        acts, probes = len(failed), 0  # nobody is there to count
    else:
        acts, probes = requests(server, "POST"), requests(server, "GET")
    assert (acts, probes, state) == (expected.calls, expected.probes, expected.state)
    assert len(failed) == acts + probes, "each try is in the log of the call"
    assert 0.8 * expected.wait <= driver.retries <= 1.2 * expected.wait
    # After 40 s the breaker is due for its probe anyhow; the garbled answers of one call count once.
    held_up = failed[0] in TRIPS - {ErrorType.BAD_RESPONSE} and expected.wait == 15.5
    assert bool(driver.breaker) is held_up, "the breaker's waits come on top, and change nothing else"


def requests(server: Wire, method: str) -> int:
    return sum(head.startswith(f"{method} ") for head, _ in server.requests)


def asking(runtime: Runtime) -> Callable[[], Awaitable[str | timedelta]]:
    async def attempt() -> str | timedelta:
        try:
            await ask_model(
                runtime,
                Wanted([{"role": "user", "content": "Discharge pat-1"}], []),
                key="wf/run/1",
                key_base="wf/run",
                name="turn-1",
                digest="asked",
                timeout_s=5,
            )
        except NotYet as wait:
            return timedelta(seconds=wait.delay)
        except ModelUnavailable as gone:
            return gone.failure.type
        raise AssertionError("it was answered")

    return attempt


def calling(runtime: Runtime, made: Tool, url: str) -> Callable[[], Awaitable[str | timedelta]]:
    activity = Tools(runtime).tool
    request = ToolRequest(
        agent=agent(made).name, key_base="wf/run", seq=1, tool=made.name, arguments={"url": f"{url}/orders"}
    )

    async def attempt() -> str | timedelta:
        outcome = await ActivityEnvironment().run(activity, request)
        if outcome.wait is None:
            return outcome.status
        return timedelta(seconds=outcome.wait.until.timestamp() - await runtime.guards.clock.now())

    return attempt
