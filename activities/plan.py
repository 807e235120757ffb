"""The plan activity: one turn of an agent's graph, idempotent by run and turn.

A retry resumes at the node that was not finished; a turn that was finished returns the decision that was recorded. The
thread's end may have been moved by an attempt that is no longer ours, so a turn never goes by that: it goes on from the
checkpoint that its caller names, and finds its own work by its tag (`holdfast.state.thread`).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.boundary import boundary, this_workflow
from activities.model import ask_model
from agents import registry
from holdfast import graph
from holdfast.agent import AgentSpec
from holdfast.contracts import Decision, Json, PlanRequest, PlanResult, Usage, absolute, digest
from holdfast.models import ModelAnswer, ModelUnavailable
from holdfast.reliability import faults
from holdfast.reliability.errors import ErrorType
from holdfast.reliability.faults import Point
from holdfast.reliability.waiting import NotYet
from holdfast.runtime import Runtime
from holdfast.state.thread import Thread
from holdfast.telemetry import metrics
from holdfast.telemetry.tracing import span
from holdfast.tools import explain

_GRAPH = graph.build().compile()

PARKS = {
    ErrorType.RATE_LIMITED,
    ErrorType.UNAVAILABLE,
    ErrorType.TIMEOUT,
    ErrorType.CONNECTION,
    ErrorType.UNREACHABLE,
    ErrorType.BAD_RESPONSE,
    ErrorType.UNAUTHORIZED,
}
"""A model that is gone comes back, and a key that expired gets mended: the run waits and nothing is undone."""


class Plan:
    """The activity with what it needs of the process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    @activity.defn(name="plan")
    async def plan(self, request: PlanRequest) -> PlanResult:
        """Runs the turn. A model that is gone is a result (`wait`), not an error."""
        turn = {"gen_ai.agent.name": request.agent, "holdfast.turn": request.turn}
        with boundary(), span(f"plan turn {request.turn}", **turn):
            base = absolute(request.key_base, this_workflow())
            try:
                return await self._turn(request.model_copy(update={"key_base": base}))
            except NotYet as wait:
                metrics.waited("breaker" if wait.service else "rate limit")
                return PlanResult(wait=wait.wait(await self._runtime.guards.clock.now()))
            except ModelUnavailable as gone:
                failure = gone.failure
                if failure.type is ErrorType.CONTENT_POLICY:
                    return PlanResult(refusal=failure.message)
                if failure.type not in PARKS:
                    raise ApplicationError(
                        f"the model refuses: {failure.message}", type=failure.type, non_retryable=True
                    ) from None
                park = NotYet(self._runtime.settings.park_s, f"the model is gone: {failure.message}")
                return PlanResult(wait=park.wait(await self._runtime.guards.clock.now()))
            except graph.MalformedOutput as error:
                raise ApplicationError(str(error), type=ErrorType.MALFORMED_OUTPUT, non_retryable=True) from None

    async def _turn(self, request: PlanRequest) -> PlanResult:
        spec = _spec(request.agent)
        # The base is part of the tag: after a Reset the same turn may be taken again from another past.
        tag = f"{request.turn}.{digest([request.base, request.input, request.answers, request.notices])[:8]}"
        where = f"turn-{request.turn}"
        faults.reached(Point.TURN_STARTED, where)

        down = await self._down(spec, request.tenant)
        notes: list[str] = []

        async def ask(messages: Sequence[Json], n: int) -> ModelAnswer:
            answer = await ask_model(
                self._runtime,
                list(messages),
                [tool.openai for tool in spec.tools if tool.name not in down],
                key=f"{request.key_base}/turn-{tag}" + (f"/ask-{n}" if n > 1 else ""),
                key_base=request.key_base,
                name=where,
                digest=tag,
                timeout_s=self._runtime.settings.model_total_s + 10,
            )
            if answer.origin:
                notes.append(f"turn {request.turn}: {answer.model} answered, {answer.origin}")
            return answer

        thread = Thread(self._runtime.db, request.key_base, tag, request.base)
        begun = await thread.open()
        app = _GRAPH.copy({"checkpointer": thread})
        context = graph.TurnContext(spec=spec, ask=ask, where=where)
        snapshot = await app.aget_state(thread.config) if begun else None
        if snapshot and not snapshot.next:
            state = snapshot.values
        else:
            value = None
            if not begun:
                inbox = _inbox(spec, request, thread)
                told: list[str] = thread.value("withdrawn", [])
                changed = sorted(down) != told
                if changed:
                    inbox.append({"role": "user", "content": _availability(down, told)})
                    notes += [f"{tool} is withdrawn: {why}" for tool, why in down.items() if tool not in told]
                value = graph.turn_input(inbox, sorted(down) if changed else None)
            state = await app.ainvoke(value, thread.config, context=context, durability="sync")
        faults.reached(Point.DECIDED, where)
        decision = Decision.model_validate(state["decision"])
        return PlanResult(
            calls=decision.calls,
            final=decision.final,
            checkpoint=thread.head,
            usage=Usage.model_validate(state["usage"]),
            model=state["new_model"],
            profile=spec.profile if request.turn == 1 else None,
            notes=notes,
        )

    async def _down(self, spec: AgentSpec, tenant: str) -> dict[str, str]:
        """Tools that cannot be had because their service's breaker is open, and why. Advice: each call is checked."""
        rows = await self._runtime.guards.shut()
        if not rows:
            return {}
        services = {tool.name: registry.service(tool.service).target(tenant) for tool in spec.tools if tool.service}
        # A tool with a fallback stays: it has an answer.
        return {
            tool.name: f"{services[tool.name]} does not answer"
            for tool in spec.tools
            if services.get(tool.name) in rows and not tool.has_fallback
        }


def _availability(down: dict[str, str], told: list[str]) -> str:
    """What the model hears of tools that went or came back."""
    lines = [f"Not available for now: {tool} ({why}). Go on with what does not need it." for tool, why in down.items()]
    lines += [f"Available again: {tool}." for tool in told if tool not in down]
    return "\n".join(lines)


def _spec(name: str) -> AgentSpec:
    try:
        return registry.agent(name)
    except registry.UnknownAgent as error:
        raise ApplicationError(str(error), type=ErrorType.INVALID_INPUT, non_retryable=True) from None


def _inbox(spec: AgentSpec, request: PlanRequest, thread: Thread) -> list[Json]:
    """The messages that the turn adds to the conversation."""
    if request.turn > 1:
        return graph.inbox_messages(thread.value("messages", []), request.answers, request.notices)
    try:
        return spec.messages(request.input or {})
    except ValidationError as error:
        raise ApplicationError(
            f"the input does not fit agent {spec.name}: {explain(error)}",
            type=ErrorType.INVALID_INPUT,
            non_retryable=True,
        ) from None
