"""The activities of tool calls and undos: each call runs under its idempotency key, through the protection chain."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from pydantic import ValidationError
from temporalio import activity
from temporalio.service import RPCError

from activities.boundary import boundary, this_workflow
from activities.model import Wanted, ask_model, spent
from activities.plan import PARKS
from holdfast.aio import to_the_end
from holdfast.authoring import registry
from holdfast.authoring.options import ModelAnswer, ModelOptions
from holdfast.authoring.services import Limit, Service
from holdfast.authoring.tools import LastGood, Tool, ToolContext, Undo
from holdfast.contracts.data import Json, clip, digest
from holdfast.contracts.failures import ErrorType, ToolFailed, explain
from holdfast.contracts.people import Finding
from holdfast.contracts.profile import Effect
from holdfast.contracts.tool_call import Checked, GiveUp, Outcome, ToolRequest, UndoOutcome, UndoStatus, absolute
from holdfast.contracts.turn import OutcomeStatus
from holdfast.engine.runtime import Runtime
from holdfast.reasoning.answers import ModelUnavailable
from holdfast.recovery.orphans import goes_on
from holdfast.reliability import crash_points, heartbeat
from holdfast.reliability.chain import StandDown, no_bound, protected, unsettled
from holdfast.reliability.crash_points import Point
from holdfast.reliability.errors import RETRIES
from holdfast.reliability.ledger import UNDONE, Call, KeyConflict, Settled, State, tool_call
from holdfast.reliability.sent_keys import outside
from holdfast.reliability.waiting import NotYet
from holdfast.state.last_good import LastGoodResults
from holdfast.state.runs import Runs
from holdfast.telemetry import metrics
from holdfast.telemetry.tracing import span

MAX_CONTENT = 100_000
"""Bytes of a result that go back to the model. The ledger keeps the whole result."""
MAX_NOTE = 2_000
"""Bytes of the note that an undo returns."""

CALLERS_FAULT = {ErrorType.REFUSED, ErrorType.INVALID_ARGUMENTS}


class Tools:
    """The activities and what they need from the process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._last_good = LastGoodResults(runtime.db, runtime.guards.clock)

    @activity.defn(name="tool")
    async def tool(self, request: ToolRequest) -> Outcome:
        """Runs one tool call. Every outcome that the model can act on is a result, not an error."""
        request = _here(request)
        with boundary(), _span("tool", request):
            tool = _find(request)
            if tool is None:
                return await self._cannot(request, f"there is no tool named {request.tool!r}")
            try:
                arguments = tool.validate(request.arguments)
            except ValidationError as error:
                return await self._cannot(request, f"bad arguments for {tool.name}: {explain(error)}")
            if tool.policy.pure:  # may be dropped when its run ends
                return await self._accounted(request, tool, arguments)
            return await to_the_end(self._accounted(request, tool, arguments))

    @activity.defn(name="undo")
    async def undo(self, request: ToolRequest) -> UndoOutcome:
        """Undoes one tool call. Idempotent; also works when the effect never happened."""
        request = _here(request)
        with boundary(), _span("undo", request):
            crash_points.reached(Point.UNDO_STARTED, request.tool)
            tool = _find(request)
            if tool is None or not tool.policy.undo:
                note = f"tool {request.tool} or its undo is gone from agent {request.agent}: undo it by hand"
                return UndoOutcome(status=UndoStatus.FAILED, note=note)
            return await to_the_end(self._undo(request, tool))

    @activity.defn(name="check")
    async def check(self, request: ToolRequest) -> Checked:
        """Whether the tool accepts these arguments, which a person has edited."""
        with boundary():
            tool = _find(request)
            if tool is None:
                return Checked(problem=f"there is no tool named {request.tool!r} any more")
            try:
                return Checked(arguments=tool.validate(request.arguments))
            except ValidationError as error:
                return Checked(problem=explain(error))

    @activity.defn(name="give_up")
    async def give_up(self, given: GiveUp) -> Outcome:
        """Closes a call that is given up. Returns its outcome as far as it is known."""
        request = _here(given.request)
        with boundary(), _span("give up", request):
            tool = _find(request)
            if tool is None:
                return await self._cannot(request, f"there is no tool named {request.tool!r}")
            # Closes the keys of its fallbacks too: a frozen attempt must not act through one when it wakes.
            closed = [(f"{request.key}/fb-{n}", each) for n, each in enumerate(tool.fallback, 1)]
            keys = [*((key, each) for key, each in closed if isinstance(each, Tool)), (request.key, tool)]
            for key, each in keys:
                await self._runtime.ledger.seize(_call(request, each, key), given.why, "gave_up")
            ends = [(key, await self._runtime.ledger.known(key)) for key, _ in keys]
            key, settled = next(((key, end) for key, end in ends if end and end.state is not State.FAILED), ends[-1])
            assert settled is not None, "closed just now"
            outcome = await self._unknown(key, settled)
            outcome.usage = await spent(self._runtime, request.key_base, f"{request.key}/")
            return outcome

    @activity.defn(name="settle")
    async def settle(self, finding: Finding) -> Outcome:
        """Records how a call ended according to a person, unless it is known to be done. Returns the recorded outcome.

        Idempotent.
        """
        with boundary():
            note = f"{finding.by} says that it did not happen" + (f": {finding.comment}" if finding.comment else "")
            await self._runtime.ledger.settle(finding.key, finding.happened, finding.result, note)
            await self._settle_undo(finding)
            crash_points.reached(Point.FINDING_RECORDED, "outcome")
            settled = await self._runtime.ledger.known(finding.key)
            if settled is None:
                return Outcome(status=OutcomeStatus.FAILED, content=note)
            return _outcome(settled)

    async def _settle_undo(self, finding: Finding) -> None:
        """Applies the finding to an undo of the call that began and is not known to be done."""
        ledger, key = self._runtime.ledger, finding.key
        note = f"settled by {finding.by}" + (f": {finding.comment}" if finding.comment else "")
        for entry in await ledger.entries(key.rpartition("/")[0]):
            call = entry.key.removesuffix("/undo")
            if entry.kind != "undo" or entry.state is State.DONE or not (call == key or call.startswith(f"{key}/fb-")):
                continue
            if not finding.happened:
                await ledger.compensated(call)
            await ledger.settle(entry.key, not finding.happened, note, note)
            if finding.happened:
                await ledger.reopen(entry.key)  # the effect stands, so it may be undone again

    async def _cannot(self, request: ToolRequest, problem: str) -> Outcome:
        """The error for the model, unless older code accepted the call: then the outcome in the ledger."""
        known = await self._runtime.ledger.known(request.key)
        return _outcome(known) if known else Outcome(status=OutcomeStatus.ERROR, content=problem)

    async def _accounted(self, request: ToolRequest, tool: Tool, arguments: Json) -> Outcome:
        """The outcome, or the wait, with the usage of all model calls of this tool call so far."""
        asked: list[str] = []
        outcome = await self._run(request, tool, arguments, asked)
        if asked or activity.info().attempt > 1:
            outcome.usage = await spent(self._runtime, request.key_base, f"{request.key}/")
        return outcome

    async def _run(self, request: ToolRequest, tool: Tool, arguments: Json, asked: list[str]) -> Outcome:
        call = _call(request, tool, request.key)
        try:
            settled = await self._protected(request, tool, call, arguments, asked)
            if settled.state is State.FAILED and settled.error_type not in CALLERS_FAULT and tool.has_fallback:
                stand_in = await self._stand_in(request, tool, arguments, asked, settled.error)
                if stand_in:
                    return stand_in
        except NotYet as wait:
            # While its service is down a fallback may answer, once it is certain that the call itself did nothing.
            if wait.service and tool.has_fallback and await self._gives_way(request, tool, call, wait.why):
                stand_in = await self._stand_in(request, tool, arguments, asked, wait.why)
                if stand_in and not stand_in.wait:
                    return stand_in
            metrics.waited(wait.cause)
            return Outcome(wait=wait.wait(await self._runtime.guards.clock.now()))
        except KeyConflict as conflict:
            return Outcome(
                status=OutcomeStatus.UNKNOWN,
                content=f"outcome unknown: {conflict}. A person has to look at it; go on without it.",
                reason=str(conflict),
            )
        if settled.state is State.UNKNOWN:
            return await self._unknown(request.key, settled)
        return _outcome(settled)

    async def _protected(
        self, request: ToolRequest, tool: Tool, call: Call, arguments: Json, asked: list[str]
    ) -> Settled:
        async def act(attempt: int) -> Any:
            return await tool.call(self._context(request, call.key, tool, attempt, asked), arguments)

        async def probe(attempt: int) -> Any:
            return await tool.run_probe(self._context(request, call.key, tool, attempt, asked), arguments)

        settled = await protected(self._runtime.guards, call, act, probe)
        if settled.state is State.DONE and any(isinstance(each, LastGood) for each in tool.fallback):
            await self._last_good.keep(tool.name, request.tenant, call.digest, settled.result)
        return settled

    async def _gives_way(self, request: ToolRequest, tool: Tool, call: Call, why: str) -> bool:
        if call.effect is Effect.READ:
            return True
        # Giving way closes the key for good, so not while the fallbacks are down as well.
        shut = await self._runtime.guards.shut()
        others = (_call(request, other, "").target for other in tool.chain[1:])
        return any(other not in shut for other in others) and await self._runtime.ledger.give_way(call, why)

    async def _stand_in(
        self, request: ToolRequest, tool: Tool, arguments: Json, asked: list[str], why: str
    ) -> Outcome | None:
        """The outcome of the first fallback that has one; a wait when only a later attempt may get one; else None.

        A fallback never stands in for a call that may have happened.
        """
        waits: list[NotYet] = []
        for n, other in enumerate(tool.fallback, 1):
            if isinstance(other, LastGood):
                digest_ = _call(request, tool, request.key).digest
                kept = await self._last_good.get(tool.name, request.tenant, digest_, other.max_age.total_seconds())
                if kept:
                    return _by(tool, kept.result, f"last good result, {kept.age} old", why)
                continue
            try:
                call = _call(request, other, f"{request.key}/fb-{n}")
                settled = await self._protected(request, other, call, arguments, asked)
            except NotYet as wait:
                waits.append(wait)
                continue
            if settled.state is State.DONE:
                return _by(tool, settled.result, other.name, why)
            if settled.state is State.UNKNOWN:
                return await self._unknown(call.key, settled)
            if settled.state is State.COMPENSATED:
                return _outcome(settled)
        if tool.template_function:
            made = await tool.run_template(self._context(request, request.key, tool, 1, asked), arguments)
            return _by(tool, made, "template", why)
        if waits:
            soonest = min(waits, key=lambda wait: wait.delay)
            return Outcome(wait=soonest.wait(await self._runtime.guards.clock.now()))
        return None

    async def _unknown(self, key: str, settled: Settled) -> Outcome:
        """An unknown outcome with what the ledger knows of the call, for the person who settles it."""
        entry = await self._runtime.ledger.entry(key)
        known = f"key {key}"
        if entry:
            begun = datetime.fromtimestamp(entry.reserved_at, UTC)
            known = f"key {key}, attempt {entry.attempt}, begun {begun:%Y-%m-%d %H:%M:%S} UTC by {entry.worker}"
        return _outcome(settled).model_copy(update={"known": known})

    async def _undo(self, request: ToolRequest, tool: Tool) -> UndoOutcome:
        """Undoes the call and its fallbacks: only one of them can have happened."""
        ends = []
        for n, each in enumerate(tool.fallback, 1):
            if isinstance(each, Tool):
                ends.append(await self._undo_one(request, each, _call(request, each, f"{request.key}/fb-{n}")))
        ends.insert(0, await self._undo_one(request, tool, _call(request, tool, request.key)))
        return next((end for end in ends if end.status is not UndoStatus.NOTHING), ends[0])

    async def _undo_one(self, request: ToolRequest, tool: Tool, call: Call) -> UndoOutcome:
        guards = self._runtime.guards
        state, result, ended = await guards.ledger.seize(call, "the run was undone before this call began")
        if state is State.FAILED or tool.undo_function is None:
            return UndoOutcome(status=UndoStatus.NOTHING)
        now = await guards.clock.now()
        if state is State.UNKNOWN and (wait := unsettled(call, ended, now)):
            # Its service may still be working on the call: that effect would stand after the undo.
            return UndoOutcome(status=UndoStatus.REGISTERED, wait=wait.wait(now))
        blind = state is State.UNKNOWN and call.effect is Effect.PROBE and call.settles_s is None
        undo = Undo(key=outside(call.key), arguments=request.arguments, result=result)
        keyed = call.effect is Effect.IDEMPOTENT  # its service accepts the undo's idempotency key as well
        undo_call = replace(call, key=f"{call.key}/undo", kind="undo", effect=Effect.IDEMPOTENT, retries=RETRIES)
        undo_call = replace(undo_call, settles_s=None if keyed else call.settles_s)

        async def act(attempt: int) -> str | None:
            # Checked under the reservation: a run that is reset looks for that, so one of the two sees the other.
            if await _goes_on(self._runtime, request):
                raise StandDown
            done = await tool.run_undo(self._context(request, undo_call.key, tool, attempt, []), undo)
            if done is None and blind:
                raise ToolFailed(f"the undo found nothing; {no_bound(call)}. Check the service, and undo it by hand")
            return done

        try:
            settled = await protected(self._runtime.guards, undo_call, act)
        except StandDown:
            return UndoOutcome(status=UndoStatus.NOTHING, note="not undone: the run was reset and goes on")
        except NotYet as wait:
            return UndoOutcome(status=UndoStatus.REGISTERED, wait=wait.wait(await self._runtime.guards.clock.now()))
        if settled.state is not State.DONE:
            return UndoOutcome(status=UndoStatus.FAILED, note=settled.error, failures=settled.failures)
        if settled.result is None:
            return UndoOutcome(status=UndoStatus.NOTHING, failures=settled.failures)
        await self._runtime.ledger.compensated(call.key)
        note = clip(settled.result, MAX_NOTE)
        return UndoOutcome(status=UndoStatus.UNDONE, note=note, failures=settled.failures)

    def _context(self, request: ToolRequest, key: str, tool: Tool, attempt: int, asked: list[str]) -> ToolContext:
        async def ask(label: str, messages: list[Json], options: ModelOptions | None = None, /) -> ModelAnswer:
            asked.append(label)
            try:
                answer = await ask_model(
                    self._runtime,
                    Wanted(messages, [], options or registry.agent(request.agent).model, whole=True),
                    key=f"{key}/{label}",
                    key_base=request.key_base,
                    name=f"{tool.name}/{label}",
                    digest=digest(messages),
                    # Not the tool's whole timeout: a call that dies as the breaker's probe blocks others for this long.
                    timeout_s=min(tool.timeout_s, self._runtime.settings.model_total_s + 10),
                )
            except ModelUnavailable as gone:
                if tool.deferrable or gone.failure.type not in PARKS:
                    raise
                # The call waits for a model as a turn does, without limit.
                why = f"the model is unavailable: {gone.failure.message}"
                raise NotYet(self._runtime.settings.park_s, why, service="model") from None
            return answer

        return ToolContext(
            key=outside(key),
            attempt=attempt,
            http=self._runtime.http,
            service_url=self._runtime.service_url,
            ask_model=ask,
            make_workspace=partial(self._runtime.workspace, request.agent),
            position=heartbeat.position(key),
            advance=partial(heartbeat.advance, key),
            servers=self._runtime.mcp,
        )


async def _goes_on(runtime: Runtime, request: ToolRequest) -> bool:
    """Whether the run goes on after a Reset. Raises NotYet while the server does not say."""
    own = activity.info().workflow_run_id or ""
    try:
        return await goes_on(activity.client(), Runs(runtime.db), request.key_base, own)
    except RPCError as error:
        raise NotYet(1.0, f"the server does not say whether the run goes on: {error.message}") from None


def _here(request: ToolRequest) -> ToolRequest:
    return request.model_copy(update={"key_base": absolute(request.key_base, this_workflow())})


def _span(kind: str, request: ToolRequest) -> AbstractContextManager[Any]:
    return span(f"{kind} {request.tool}", **{"gen_ai.tool.name": request.tool, "holdfast.key": request.key})


def _find(request: ToolRequest) -> Tool | None:
    try:
        return registry.agent(request.agent).tool(request.tool, request.version)
    except registry.UnknownAgent:
        return None  # a deploy removed the agent


def _call(request: ToolRequest, tool: Tool, key: str) -> Call:
    # The arguments as in history: a deploy that adds an argument with a default must not change the call.
    service = registry.service(tool.service)
    # A tool that asks a model is guarded there, by the model's own circuit breaker and rate limits.
    external = tool.service not in ("", "model")
    own = Limit(f"tool {Service(tool.name).target(request.tenant)}", tool.per_minute) if tool.per_minute else None
    limits = (service.limit(request.tenant) if external else None, own)
    return tool_call(
        key,
        request.key_base,
        tool.name,
        tool.effect,
        request.arguments,
        version=tool.version,
        service=tool.service,
        seq=request.seq,
        timeout_s=tool.timeout_s,
        retries=tool.retries,
        agent=request.agent,
        target=service.target(request.tenant) if external else "",
        rule=service.breaker,
        limits=tuple(limit for limit in limits if limit),
        settles_s=settles_within(tool),
        pure=tool.pure,
        in_flight=service.in_flight(request.tenant),
    )


def settles_within(tool: Tool) -> float | None:
    """The bound that the tool declares, else that of its service."""
    return registry.service(tool.service).settles_within if tool.settles_s is None else tool.settles_s


def _by(tool: Tool, result: Any, by: str, why: str) -> Outcome:
    """The outcome of a fallback. It tells the model and the reader so."""
    metrics.fallback(tool.name, by)
    content = f"[{by}, in place of {tool.name}: {why}]\n{_text(result)}"
    return Outcome(content=content, origin=by, notes=[f"{tool.name}: {by} ({why})"])


def _outcome(settled: Settled) -> Outcome:
    """The outcome of a settled call, as the model reads it."""
    reason = settled.error
    if settled.state is State.DONE:
        status, content = OutcomeStatus.OK, _text(settled.result)
    elif settled.state is State.COMPENSATED or settled.error_type == UNDONE:
        # The run was unwound and then reset: the old result no longer holds, and its key cannot be used again.
        status, reason = OutcomeStatus.ERROR, "it was undone when the run was unwound"
        content = f"not done: {reason}. Call it again if it is still needed"
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
    return Outcome(
        status=status,
        content=content,
        reason=reason,
        failures=settled.failures,
        notes=list(settled.notes),
    )


def _text(result: Any) -> str:
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    return clip(text, MAX_CONTENT)
