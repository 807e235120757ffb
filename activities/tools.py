"""The tool activity and its undo: one call under its idempotency key, through the protection chain."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from temporalio import activity

from activities.boundary import boundary, this_workflow
from activities.model import ask_model
from agents import registry
from holdfast.aio import to_the_end
from holdfast.contracts import (
    Effect,
    Json,
    Outcome,
    OutcomeStatus,
    ToolRequest,
    UndoOutcome,
    UndoStatus,
    Usage,
    absolute,
    clip,
    digest,
)
from holdfast.models import ModelAnswer
from holdfast.reliability import faults
from holdfast.reliability.chain import protected
from holdfast.reliability.errors import RETRIES, ErrorType
from holdfast.reliability.faults import Point
from holdfast.reliability.ledger import Call, KeyConflict, Settled, State, tool_call
from holdfast.runtime import Runtime
from holdfast.telemetry.tracing import span
from holdfast.tools import Tool, ToolContext, Undo, explain

MAX_CONTENT = 100_000
"""Bytes of a result that go back to the model. The ledger keeps the whole."""

CALLERS_FAULT = {ErrorType.REFUSED, ErrorType.INVALID_ARGUMENTS}


class Tools:
    """The activities with what they need of the process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    @activity.defn(name="tool")
    async def tool(self, request: ToolRequest) -> Outcome:
        """Runs one tool call. Every end that the model can act on is a result, not an error."""
        request = _here(request)
        with boundary(), _span("tool", request):
            tool = _find(request)
            if tool is None:
                return await self._cannot(request, f"there is no tool named {request.tool!r}")
            try:
                arguments = tool.validate(request.arguments)
            except ValidationError as error:
                return await self._cannot(request, f"bad arguments for {tool.name}: {explain(error)}")
            return await to_the_end(self._run(request, tool, arguments))

    @activity.defn(name="undo")
    async def undo(self, request: ToolRequest) -> UndoOutcome:
        """Undoes one tool call. Idempotent; copes with an effect that never happened."""
        request = _here(request)
        with boundary(), _span("undo", request):
            faults.reached(Point.UNDO_STARTED, request.tool)
            tool = _find(request)
            if tool is None or tool.undo_function is None:
                note = f"tool {request.tool} or its undo is gone from agent {request.agent}: undo it by hand"
                return UndoOutcome(status=UndoStatus.FAILED, note=note)
            return await to_the_end(self._undo(request, tool))

    async def _cannot(self, request: ToolRequest, problem: str) -> Outcome:
        """The model's mistake, unless an earlier version of the code took the call: then what is known of it counts."""
        known = await self._runtime.ledger.known(request.key)
        return _outcome(known, Usage()) if known else Outcome(status=OutcomeStatus.ERROR, content=problem)

    async def _run(self, request: ToolRequest, tool: Tool, arguments: Json) -> Outcome:
        call = _call(request, tool)
        usage: list[Usage] = []

        async def act(attempt: int) -> Any:
            return await tool.call(self._context(request.key, request.key_base, tool, attempt, usage), arguments)

        async def probe(attempt: int) -> Any:
            return await tool.run_probe(self._context(request.key, request.key_base, tool, attempt, usage), arguments)

        try:
            settled = await protected(self._runtime.ledger, call, act, probe)
        except KeyConflict as conflict:
            return Outcome(
                status=OutcomeStatus.UNKNOWN,
                content=f"outcome unknown: {conflict}. A person has to look at it; go on without it.",
                reason=str(conflict),
            )
        return _outcome(settled, sum(usage, Usage()))

    async def _undo(self, request: ToolRequest, tool: Tool) -> UndoOutcome:
        call = _call(request, tool)
        state, result = await self._runtime.ledger.seize(call, "the run was undone before this call began")
        if state is State.FAILED:
            return UndoOutcome(status=UndoStatus.NOTHING)
        undo = Undo(key=request.key, arguments=request.arguments, result=result)
        undo_call = replace(call, key=f"{request.key}/undo", kind="undo", effect=Effect.IDEMPOTENT, retries=RETRIES)

        async def act(attempt: int) -> str | None:
            return await tool.run_undo(self._context(undo_call.key, request.key_base, tool, attempt, []), undo)

        settled = await protected(self._runtime.ledger, undo_call, act)
        if settled.state is not State.DONE:
            return UndoOutcome(status=UndoStatus.FAILED, note=settled.error, failures=settled.failures)
        if settled.result is None:
            return UndoOutcome(status=UndoStatus.NOTHING, failures=settled.failures)
        await self._runtime.ledger.compensated(request.key)
        return UndoOutcome(status=UndoStatus.UNDONE, note=settled.result, failures=settled.failures)

    def _context(self, key: str, key_base: str, tool: Tool, attempt: int, usage: list[Usage]) -> ToolContext:
        async def ask(label: str, messages: list[Json]) -> ModelAnswer:
            answer = await ask_model(
                self._runtime,
                messages,
                [],
                key=f"{key}/{label}",
                key_base=key_base,
                name=f"{tool.name}/{label}",
                digest=digest(messages),
                timeout_s=tool.timeout_s,
            )
            usage.append(answer.usage)
            return answer

        return ToolContext(
            key=key,
            attempt=attempt,
            http=self._runtime.http,
            service_url=self._runtime.service_url,
            ask_model=ask,
        )


def _here(request: ToolRequest) -> ToolRequest:
    return request.model_copy(update={"key_base": absolute(request.key_base, this_workflow())})


def _span(kind: str, request: ToolRequest) -> AbstractContextManager[Any]:
    return span(f"{kind} {request.tool}", **{"gen_ai.tool.name": request.tool, "holdfast.key": request.key})


def _find(request: ToolRequest) -> Tool | None:
    try:
        return registry.agent(request.agent).by_name.get(request.tool)
    except registry.UnknownAgent:
        return None  # an agent that a deploy took away, with its tools


def _call(request: ToolRequest, tool: Tool) -> Call:
    # The arguments as history has them: a deploy that adds an argument with a default must not make another call of it.
    return tool_call(
        request.key,
        request.key_base,
        tool.name,
        tool.effect,
        request.arguments,
        version=tool.version,
        service=tool.service,
        seq=request.seq,
        timeout_s=tool.timeout_s,
        retries=tool.retries,
    )


def _outcome(settled: Settled, usage: Usage) -> Outcome:
    """What the model reads of a call's end."""
    reason = settled.error
    if settled.state is State.DONE:
        status, content = OutcomeStatus.OK, _text(settled.result)
    elif settled.state is State.COMPENSATED:
        # A run that was unwound and then reset: its old result no longer holds.
        status, reason = OutcomeStatus.FAILED, "it was undone when the run was unwound"
        content = f"failed for good: {reason}; it is not done again under the same key"
    elif settled.state is State.UNKNOWN:
        status, reason = OutcomeStatus.UNKNOWN, f"{settled.error}; it may have happened"
        content = (
            f"outcome unknown: {settled.error}. It may have happened. It is left pending for a person; "
            "do not call this tool again, go on without it."
        )
    elif settled.error_type in CALLERS_FAULT:
        status, content = OutcomeStatus.ERROR, f"error: {settled.error}"
    else:
        status = OutcomeStatus.FAILED
        content = f"failed for good after {settled.failures} failures: {settled.error}"
    return Outcome(status=status, content=content, reason=reason, failures=settled.failures, usage=usage)


def _text(result: Any) -> str:
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    return clip(text, MAX_CONTENT)
