"""The plan activity: one turn of an agent's graph, idempotent by run and turn.

A retry resumes at the node that was not finished; a turn that was finished returns the decision that was recorded. The
thread's head may have been moved by an attempt that is no longer ours, so a turn never goes by the head: it forks from
the checkpoint its caller names, and finds its own work by its tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata, CheckpointTuple
from pydantic import ValidationError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.boundary import boundary
from agents import registry
from holdfast import graph
from holdfast.agent import AgentSpec
from holdfast.contracts import Decision, Effect, Json, PlanRequest, PlanResult, Usage, Wait, digest
from holdfast.models import ModelAnswer
from holdfast.reliability import faults
from holdfast.reliability.chain import protected
from holdfast.reliability.errors import ErrorType
from holdfast.reliability.faults import Point
from holdfast.reliability.ledger import Call, Settled, State
from holdfast.runtime import Runtime
from holdfast.state.checkpoints import Checkpoints
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


class ModelGone(Exception):
    """The model gave no answer and the retries of this turn are used up, or would not help."""

    def __init__(self, settled: Settled) -> None:
        super().__init__(settled.error)
        self.settled = settled


class _Turn(Checkpoints):
    """Remembers what this attempt wrote last: the thread's head may be another attempt's."""

    last_put: str = ""

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        stored = await super().aput(config, checkpoint, metadata, new_versions)
        if not config.get("configurable", {}).get("checkpoint_ns"):
            self.last_put = checkpoint["id"]
        return stored


class Plan:
    """The activity with what it needs of the process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    @activity.defn(name="plan")
    async def plan(self, request: PlanRequest) -> PlanResult:
        """Runs the turn. A model that is gone is a result (`wait`), not an error."""
        turn = {"gen_ai.agent.name": request.agent, "holdfast.turn": request.turn}
        with boundary(), span(f"plan turn {request.turn}", **turn):
            try:
                return await self._turn(request)
            except ModelGone as gone:
                settled = gone.settled
                if settled.error_type not in PARKS:
                    raise ApplicationError(
                        f"the model refuses: {settled.error}", type=settled.error_type, non_retryable=True
                    ) from gone
                until = datetime.now(UTC) + timedelta(seconds=self._runtime.settings.park_s)
                return PlanResult(wait=Wait(until=until, why=f"the model is gone: {settled.error}"))
            except graph.MalformedOutput as error:
                raise ApplicationError(str(error), type=ErrorType.MALFORMED_OUTPUT, non_retryable=True) from error

    async def _turn(self, request: PlanRequest) -> PlanResult:
        spec = _spec(request.agent)
        new = _first_messages(spec, request.input or {}) if request.turn == 1 else graph.inbox_messages(request.inbox)
        # The base is part of the tag: after a Reset the same turn may be taken again from another past.
        tag = f"{request.turn}.{digest([request.base, request.input, [n.model_dump() for n in request.inbox]])[:8]}"
        where = f"turn-{request.turn}"
        faults.reached(Point.TURN_STARTED, where)

        async def ask(messages: Sequence[Json], n: int) -> ModelAnswer:
            return await self._ask(request, spec, list(messages), tag, n)

        saver = _Turn(self._runtime.db)
        app = _GRAPH.copy({"checkpointer": saver})
        context = graph.TurnContext(spec=spec, ask=ask, where=where)
        thread: Json = {"thread_id": request.key_base, "checkpoint_ns": ""}
        config: RunnableConfig = {"configurable": dict(thread), "metadata": {"turn": tag}}

        def pin(checkpoint_id: str) -> None:
            config["configurable"] = {**thread, "checkpoint_id": checkpoint_id}

        hits = [hit async for hit in saver.alist({"configurable": thread}, filter={"turn": tag}, limit=1)]
        state: dict[str, Any]
        if not hits:
            if request.base:
                pin(request.base)
            state = await app.ainvoke(graph.turn_input(new), config, context=context, durability="sync")
            checkpoint = saver.last_put
        else:
            found = _id(hits[0])
            at: RunnableConfig = {"configurable": {**thread, "checkpoint_id": found}}
            snapshot = await app.aget_state(at)
            state, checkpoint = snapshot.values, found
            if snapshot.next:
                head = [h async for h in saver.alist({"configurable": thread}, limit=1)]
                if _id(head[0]) != found:
                    pin(found)
                state = await app.ainvoke(None, config, context=context, durability="sync")
                checkpoint = saver.last_put
        faults.reached(Point.DECIDED, where)
        return PlanResult(
            decision=Decision.model_validate(state["decision"]),
            checkpoint=checkpoint,
            usage=Usage.model_validate(state["usage"]),
            model=state["model"],
            profile=spec.profile if request.turn == 1 else None,
        )

    async def _ask(self, request: PlanRequest, spec: AgentSpec, messages: list[Json], tag: str, n: int) -> ModelAnswer:
        key = f"{request.key_base}/turn-{tag}" + (f"/ask-{n}" if n > 1 else "")
        call = Call(
            key=key,
            key_base=request.key_base,
            kind="model",
            name=f"turn-{request.turn}",
            effect=Effect.IDEMPOTENT,
            arguments=None,
            digest=tag,
            service="model",
            timeout_s=self._runtime.settings.model_total_s + 10,
        )

        async def act(attempt: int) -> Json:
            return (await self._runtime.models.complete(messages, [t.openai for t in spec.tools], key=key)).to_json()

        settled = await protected(self._runtime.ledger, call, act)
        if settled.state is not State.DONE:
            raise ModelGone(settled)
        return ModelAnswer.from_json(settled.result)


def _id(found: CheckpointTuple) -> str:
    return found.config.get("configurable", {})["checkpoint_id"]


def _spec(name: str) -> AgentSpec:
    try:
        return registry.agent(name)
    except registry.UnknownAgent as error:
        raise ApplicationError(str(error), type=ErrorType.INVALID_INPUT, non_retryable=True) from error


def _first_messages(spec: AgentSpec, value: Json) -> list[Json]:
    try:
        return spec.messages(value)
    except ValidationError as error:
        raise ApplicationError(
            f"the input does not fit agent {spec.name}: {explain(error)}",
            type=ErrorType.INVALID_INPUT,
            non_retryable=True,
        ) from error
