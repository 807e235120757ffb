"""The input of a workflow. A person may start a workflow by hand, with anything: invalid input fails it with a message.

A typed parameter would not do that: with no input, two inputs, or one that does not decode, Temporal never reaches the
constructor and retries the workflow task forever.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from temporalio import workflow
from temporalio.exceptions import ApplicationError

from holdfast.contracts import outside
from holdfast.contracts.batch import BatchInput
from holdfast.contracts.failures import ErrorType, explain
from holdfast.contracts.run import AgentInput

T = TypeVar("T", bound=BaseModel)
Start = TypeVar("Start", AgentInput, BatchInput)

RUN = '{"agent": "…", "input": {}}'
BATCH = '{"batch": "…", "input": {}}'
MAX_NAME = 200
"""Characters of a name. Temporal accepts at most 2 kB for a search attribute."""
NAMES = {"agent", "batch", "request_key", "tenant", "queue"}
MAX_LONGER = 2_000
LONGER = {"requested_by", "trace_id", "webhook"}


def one(kind: type[T], given: tuple[Any, ...], example: str = "") -> T:
    """The input of a workflow, as this kind. Raises ApplicationError, which fails the workflow."""
    like = f"an object like {example}" if example else f"an object with {', '.join(kind.model_fields)}"
    if len(given) != 1:
        raise _refused(f"exactly one input is taken, {like}; there are {len(given)}")
    if isinstance(given[0], kind):
        return given[0]
    try:
        return kind.model_validate(given[0])
    except ValidationError as error:
        raise _refused(f"the input of a run is {like}: {explain(error)[:2000]}") from None


def start(kind: type[Start], given: tuple[Any, ...], example: str) -> Start:
    """The input of a run or a batch, checked against the limits for data from outside."""
    value = one(kind, given, example)
    if wrong := _problem(value):
        raise _refused(wrong)
    return value


def _problem(value: AgentInput | BatchInput) -> str:
    if value.state is not None and not workflow.info().continued_run_id:
        return "`state` is what continue-as-new hands on: leave it out"
    for name, text in value.model_dump(include=NAMES | LONGER).items():
        most = MAX_NAME if name in NAMES else MAX_LONGER
        if len(text) > most or not text.isprintable():
            return f"`{name}` takes printable text of at most {most:,} characters; it has {len(text):,}: {text[:80]!r}"
    standing = [each.model_dump() for each in value.standing] if isinstance(value, AgentInput) else []
    if wrong := outside.problem(standing, outside.MAX_INPUT):
        return f"`standing` {wrong}"
    if wrong := outside.problem(value.input, outside.MAX_INPUT):
        return f"`input` {wrong}"
    return ""


def _refused(words: str) -> ApplicationError:
    return ApplicationError(words, type=ErrorType.INVALID_INPUT, non_retryable=True)
