"""The plan activity: one turn of an agent's graph, idempotent by run and turn.

A retry resumes at the first unfinished node; a finished turn returns its recorded decision. Another attempt may have
moved the end of the thread, so a turn does not rely on it: the turn continues from the checkpoint that the request
names, and finds its own work by its tag (`holdfast.reasoning.thread`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from langgraph.errors import GraphRecursionError
from langgraph.types import Command, Interrupt
from pydantic import ValidationError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.asking import Asking, prefix_of
from activities.boundary import boundary, not_known_yet, this_workflow
from activities.model import spent
from holdfast.authoring import registry
from holdfast.authoring.agent import AgentSpec
from holdfast.contracts import outside
from holdfast.contracts.data import Json, digest
from holdfast.contracts.failures import ErrorType, Failure, explain
from holdfast.contracts.people import MAX_SAID
from holdfast.contracts.tool_call import absolute
from holdfast.contracts.turn import OutcomeStatus, PlanRequest, PlanResult, Question, Usage
from holdfast.engine.runtime import Runtime
from holdfast.reasoning import graph, turns
from holdfast.reasoning.answers import ModelUnavailable
from holdfast.reasoning.checkpointer import Unstorable
from holdfast.reasoning.conversation import MalformedOutput
from holdfast.reasoning.loading import compiled
from holdfast.reasoning.thread import Forgotten, Thread
from holdfast.reliability import crash_points
from holdfast.reliability.crash_points import Point
from holdfast.reliability.waiting import NotYet
from holdfast.telemetry import metrics
from holdfast.telemetry.tracing import span

PARKS = {
    ErrorType.RATE_LIMITED,
    ErrorType.UNAVAILABLE,
    ErrorType.TIMEOUT,
    ErrorType.CONNECTION,
    ErrorType.UNREACHABLE,
    ErrorType.BAD_RESPONSE,
    ErrorType.UNAUTHORIZED,
}
"""Failures that pass: a model comes back, an expired key is replaced. The run parks, and nothing is undone."""
LONGEST_PARK_S = 600.0
"""The longest pause before a model that is too slow is asked again."""


class Plan:
    """The activity and what it needs from the process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    @activity.defn(name="plan")
    async def plan(self, request: PlanRequest) -> PlanResult:
        """Runs the turn. An unavailable model is a result (`wait`), not an error."""
        turn = {"gen_ai.agent.name": request.agent, "holdfast.turn": request.turn}
        with boundary(), span(f"plan turn {request.turn}", **turn):
            base = absolute(request.key_base, this_workflow())
            request = request.model_copy(update={"key_base": base})
            try:
                return await self._turn(request)
            except NotYet as wait:
                metrics.waited(wait.cause)
                return PlanResult(
                    wait=wait.wait(await self._runtime.guards.clock.now()), usage=await self._spent(request)
                )
            except ModelUnavailable as gone:
                return await self._unavailable(request, gone.failure)
            except MalformedOutput as error:
                raise await self._failed(request, str(error), ErrorType.MALFORMED_OUTPUT) from None
            except Forgotten as error:
                later = timedelta(seconds=self._runtime.settings.park_s)
                raise ApplicationError(str(error), type=ErrorType.FORGOTTEN, next_retry_delay=later) from None
            except (graph.BadGraph, Unstorable, GraphRecursionError) as error:
                raise await self._failed(request, f"agent {request.agent}: {error}", ErrorType.BAD_GRAPH) from None

    async def _unavailable(self, request: PlanRequest, failure: Failure) -> PlanResult:
        """The result of a turn whose models do not answer: a wait, or a question to a person. Raises to end the run."""
        used = await self._spent(request)
        if failure.type is ErrorType.CONTENT_POLICY:
            return PlanResult(refusal=failure.message, usage=used)
        if failure.type not in PARKS:
            what = "rambles" if failure.type is ErrorType.RAMBLING else "refuses"
            raise await self._failed(request, f"the model {what}: {failure.message}", failure.type)
        pause, words = self._runtime.settings.park_s, f"the model is unavailable: {failure.message}"
        if used.calls and failure.type is ErrorType.TIMEOUT:
            # It answers, but never in time, and each attempt costs: the pause doubles.
            pause = min(pause * 2 ** min(used.calls, 10), max(LONGEST_PARK_S, pause))
            tokens = used.input_tokens + used.output_tokens
            words = f"the model is too slow: {failure.message}; this turn has used {tokens} tokens, with cut answers"
        park = NotYet(pause, words, service="model")
        return PlanResult(wait=park.wait(await self._runtime.guards.clock.now()), usage=used)

    async def _failed(self, request: PlanRequest, words: str, type: ErrorType) -> ApplicationError:
        """The error that ends the run. It carries the turn's usage, because there is no result to carry it."""
        used = await self._spent(request)
        return ApplicationError(words, used, type=type, non_retryable=True)

    async def _spent(self, request: PlanRequest) -> Usage:
        return await spent(self._runtime, request.key_base, prefix_of(request.key_base, _tag(request)))

    async def _turn(self, request: PlanRequest) -> PlanResult:
        spec, gone, lost = await self._bound(request)
        tag = _tag(request)
        where = f"turn-{request.turn}"
        crash_points.reached(Point.TURN_STARTED, where)

        shut = await self._down(spec, request)
        down = shut | gone
        built_in = spec.graph is None
        thread = Thread(self._runtime.db, request.key_base, tag, request.base, lean=built_in)
        resumed = await thread.open()
        notes: list[str] = []
        asking = Asking(self._runtime, request, tag, thread, notes, spec.model)
        app = compiled(spec.graph, spec.name).copy({"checkpointer": thread})
        snapshot = await app.aget_state(thread.config) if resumed else None
        if snapshot and not snapshot.tasks:
            state = snapshot.values
        else:
            value: Any = (
                _resume(snapshot.interrupts, request) if snapshot else _begin(spec, request, thread, down, notes)
            )
            context = graph.Turn(spec, request.turn, where, frozenset(down), asking, _open(spec, request))
            durability = "exit" if built_in else "sync"
            state = await app.ainvoke(value, thread.config, context=context, durability=durability)
        profile = spec.profile if request.turn == 1 else None
        if asked := state.get("__interrupt__"):
            used = await self._spent(request)
            return PlanResult(questions=[_question(each) for each in asked], profile=profile, notes=notes, usage=used)
        crash_points.reached(Point.DECIDED, where)
        decision = turns.decision_of(state, spec)
        usage, model = await asking.account(resumed=resumed)
        return PlanResult(
            calls=decision.calls,
            final=decision.final,
            checkpoint=thread.head,
            usage=usage,
            model=model,
            profile=profile,
            notes=notes,
            withdrawn=[*shut, *lost],
        )

    async def _bound(self, request: PlanRequest) -> tuple[AgentSpec, dict[str, str], list[str]]:
        """The agent with the tools of its MCP servers; which servers are down, and why; their tools that are in steps.

        Raises NotYet when the turn needs a server that is down.
        """
        spec, down = await self._runtime.mcp.bind(_spec(request.agent))
        for server in spec.mcp:
            # Turn 1 needs all of them: it returns the profile, which has their tools, for the rest of the run.
            needed = request.turn == 1 or any(map(server.may_have, request.offered))
            if server.name in down and needed:
                raise NotYet(self._runtime.settings.park_s, down[server.name], service=server.name)
        in_steps = {name for step in spec.steps for name in step.tools}
        lost = [name for name in in_steps for server in spec.mcp if server.name in down and server.may_have(name)]
        return spec, {f"every tool of server {server}": why for server, why in down.items()}, sorted(lost)

    async def _down(self, spec: AgentSpec, request: PlanRequest) -> dict[str, str]:
        """Tools to withdraw because their service's circuit breaker is open, and why. Advice: calls check it."""
        rows = await self._runtime.guards.shut()
        if not rows:
            return {}
        targets = {tool.name: registry.service(tool.service).target(request.tenant) for tool in spec.tools}
        # A tool with a fallback stays: it has an answer. So does one that is not deferred: the run waits for its call.
        return {
            tool.name: f"{targets[tool.name]} does not answer"
            for tool in spec.tools
            if tool.service and targets[tool.name] in rows and tool.deferrable
            if not tool.has_fallback and tool.name not in request.offered
        }


def _tag(request: PlanRequest) -> str:
    """Names the turn's work and includes its past: after a Reset the same turn may run again with another past."""
    return f"{request.turn}.{digest([request.base, request.input, request.answers, request.notices])[:8]}"


def _open(spec: AgentSpec, request: PlanRequest) -> frozenset[str]:
    if request.turn > 1:
        return frozenset(request.open)
    return frozenset(tool for step in spec.steps if step.critical for tool in step.tools)


def _availability(down: dict[str, str], told: list[str], offered: list[str]) -> str:
    """The notice about tools that were withdrawn or came back. The run itself announces the tools in `offered`."""
    lines = [f"Not available for now: {tool} ({why}). Go on with what does not need it." for tool, why in down.items()]
    lines += [f"Available again: {tool}." for tool in told if tool not in down and tool not in offered]
    return "\n".join(lines)


def _spec(name: str) -> AgentSpec:
    try:
        return registry.agent(name)
    except registry.UnknownAgent as error:
        raise not_known_yet(error) from None


def _begin(spec: AgentSpec, request: PlanRequest, thread: Thread, down: dict[str, str], notes: list[str]) -> Json:
    """The graph's input at the beginning of a turn."""
    value: Json | None = None
    if request.turn == 1:
        try:
            value = spec.input.model_validate(request.input or {}).model_dump(mode="json")
        except ValidationError as error:
            raise ApplicationError(
                f"the input does not fit agent {spec.name}: {explain(error)}",
                type=ErrorType.INVALID_INPUT,
                non_retryable=True,
            ) from None
    notices = list(request.notices)
    told: list[str] = thread.carried.get("withdrawn", [])
    if sorted(down) != told and (news := _availability(down, told, request.offered)):
        notices.append(news)
        notes += [f"{tool} is withdrawn: {why}" for tool, why in down.items() if tool not in told]
    before: str = thread.carried.get("model") or thread.carried.get("before", "")
    thread.carried = {"before": before, "withdrawn": sorted(down)}
    statuses = request.statuses or [OutcomeStatus.OK] * len(request.answers)
    told_ = list(zip(request.answers, statuses, strict=True))
    return turns.turn_input(value, told_, notices, thread.value("decision", None))


def _resume(asked: Sequence[Interrupt], request: PlanRequest) -> Command[Any] | None:
    """How the graph resumes in the middle of a turn: with the replies to its open questions, if any.

    Only to open questions: LangGraph would take an older reply of a node for the answer to its next question.
    """
    replies = {reply.id: reply.value for reply in request.replies}
    resume = {each.id: replies[each.id] for each in asked if each.id in replies}
    return Command(resume=resume) if resume else None


def _question(asked: Interrupt) -> Question:
    """The question of an interrupt: its value if that is a text, else the text in it, with the value as JSON beside it.

    A value without a text is described by its field names only: webhooks carry the text, and must not carry data.
    """
    value = asked.value
    if wrong := outside.problem(value, MAX_SAID):
        kind = type(value).__name__
        raise graph.BadGraph(f"interrupt() takes JSON that a person can read; got {kind}, and it {wrong}")
    if isinstance(value, str):
        return Question(id=asked.id, text=value)
    try:
        data = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise graph.BadGraph(
            f"interrupt() takes JSON, for a person reads it; got {type(value).__name__}: {error}"
        ) from None
    text = (data.get("question") or data.get("text")) if isinstance(data, dict) else None
    if not isinstance(text, str):
        text = f"An answer is needed: {', '.join(data)}" if isinstance(data, dict) and data else "An answer is needed"
    return Question(id=asked.id, text=text, data=data)
