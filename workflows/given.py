"""What a workflow is started with. Anybody may start one by hand, with anything: what cannot be taken ends it in words.

A typed parameter would not do: with no input, with two, or with one that does not decode, the constructor is never
reached, and the workflow task is tried again for ever.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from temporalio import workflow
from temporalio.exceptions import ApplicationError

from holdfast import outside
from holdfast.batch import BatchInput
from holdfast.contracts import AgentInput
from holdfast.reliability.errors import ErrorType
from holdfast.tools import explain

T = TypeVar("T", bound=BaseModel)
Start = TypeVar("Start", AgentInput, BatchInput)

RUN = '{"agent": "…", "input": {}}'
BATCH = '{"batch": "…", "input": {}}'
MAX_NAME = 200
"""Characters of a name. Temporal takes no search attribute of more than 2 kB."""
NAMES = {"agent", "batch", "request_key", "tenant", "queue"}
MAX_LONGER = 2_000
LONGER = {"requested_by", "trace_id", "webhook"}


def one(kind: type[T], given: tuple[Any, ...], example: str = "") -> T:
    """The input of a workflow, as this kind. Raises ApplicationError, which ends the workflow."""
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
    """The same of a run or a batch, within the limits of what comes from outside."""
    value = one(kind, given, example)
    # Asked for only when there is something wrong: runs that began before these limits go on without them.
    if (wrong := _problem(value)) and workflow.patched("start-within-limits"):
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
