"""A model call of a turn or a tool through the protection chain, with fallback to the next models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from holdfast.authoring.options import AS_SET, ModelAnswer, ModelOptions
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ErrorType, Failure
from holdfast.contracts.profile import Effect
from holdfast.contracts.turn import Usage
from holdfast.engine.runtime import Runtime
from holdfast.reasoning.answers import ModelUnavailable
from holdfast.reasoning.conversation import CUT
from holdfast.reasoning.model_client import ModelClient, compacted, estimate
from holdfast.reliability.chain import protected
from holdfast.reliability.ledger import Call, State
from holdfast.reliability.waiting import NotYet
from holdfast.telemetry import metrics

MOST_CUT = 3
"""After this many answers to one question that are cut because the model rambles, it is not asked again."""


@dataclass(frozen=True)
class Wanted:
    """What to ask a model, and how."""

    messages: list[Json]
    tools: list[Json]
    options: ModelOptions = AS_SET
    must_call: bool = False
    whole: bool = False
    """Treat an answer that was cut at its limit as rambling: nothing would tell the model that it was cut."""


async def ask_model(
    runtime: Runtime,
    wanted: Wanted,
    *,
    key: str,
    key_base: str,
    name: str,
    digest: str,
    timeout_s: float,
    cut: Callable[[], None] = lambda: None,
) -> ModelAnswer:
    """The answer recorded under `key`, else the answer of the first model that gives one, which is recorded there.

    The kind of failure decides what happens when a model does not answer. The model is unavailable, its circuit breaker
    is open, or it rambles: the next model is asked. The conversation is too long for it: the next model with a larger
    window is asked, and at last one gets a compacted conversation. It refuses by its policy: no other model is asked.
    name: what crash points and readers of the ledger call the model call. digest: of what is asked. cut: called for
    each call that was cut; the ledger has its cost.
    Raises RetryLater; NotYet; ModelUnavailable when the retries are used up or would not help.
    """
    call = Call(
        key=key,
        key_base=key_base,
        kind="model",
        name=name,
        effect=Effect.READ,
        arguments=None,
        digest=digest,
        service="model",
        timeout_s=timeout_s,
    )
    troubles: list[Failure] = []
    waits: list[NotYet] = []
    for n, model in enumerate(runtime.models):
        if any(t.type is ErrorType.CONTEXT_OVERFLOW for t in troubles) and not _larger(model, runtime.models[:n]):
            continue
        try:
            answer = await _ask(runtime, model, call, wanted, f"{key}/fb-{n}" if n else key, cut)
        except NotYet as wait:
            if not wait.service:
                raise  # a rate limit says when to retry, and the model works
            waits.append(wait)
            troubles.append(Failure(ErrorType.UNAVAILABLE, wait.why))
        except ModelUnavailable as gone:
            if gone.failure.type is ErrorType.CONTENT_POLICY:
                raise
            troubles.append(gone.failure)
        else:
            return _named(answer, runtime.models[0], n, troubles)
    if any(t.type is ErrorType.CONTEXT_OVERFLOW for t in troubles) and (shorter := compacted(wanted.messages)):
        model = max(runtime.models, key=lambda each: each.window or 0)
        less = replace(wanted, messages=shorter)
        answer = await _ask(runtime, model, replace(call, key=f"{key}/compact"), less, f"{key}/compact", cut)
        return replace(answer, origin="from a compacted conversation: it was too long")
    if waits:
        raise min(waits, key=lambda wait: wait.delay)
    raise ModelUnavailable(troubles[0])


async def spent(runtime: Runtime, key_base: str, prefix: str) -> Usage:
    """The usage of all model calls whose keys begin with `prefix`, including those that were cut."""
    calls = await runtime.ledger.models(key_base, prefix)
    return sum((Usage.model_validate(each.result["usage"]) for each in calls if each.result), Usage())


async def _ask(
    runtime: Runtime, model: ModelClient, call: Call, wanted: Wanted, sent_as: str, cut: Callable[[], None]
) -> ModelAnswer:
    """Asks one model. The answer of any model is kept under the call's key, so that a retry finds it first."""
    counts = model.window or model.service.tokens_per_minute
    size = estimate(wanted.messages, wanted.tools) if counts else 0
    if model.window and size > model.window:
        words = f"the conversation has some {size} tokens and {model.model} takes {model.window}"
        raise ModelUnavailable(Failure(ErrorType.CONTEXT_OVERFLOW, words))
    limit = model.service.limit("default")
    most = model.most(wanted.options, size)
    call = replace(
        call,
        target=model.service.name,
        rule=model.service.breaker,
        limits=(limit,) if limit else (),
        in_flight=model.service.in_flight("default"),
        tokens=size + min(model.usual_output, most),
    )

    async def act(attempt: int) -> Json:
        try:
            answer = await model.complete(
                wanted.messages, wanted.tools, key=sent_as, options=wanted.options, must_call=wanted.must_call
            )
            if wanted.whole and answer.message.get(CUT):
                words = f"model {answer.model}: its answer was cut at its limit of {most} tokens"
                raise ModelUnavailable(Failure(ErrorType.RAMBLING, words, retry=True), answer.usage)
        except ModelUnavailable as gone:
            if gone.usage is None:
                raise
            cut()
            times = await runtime.ledger.cut(call, sent_as, gone.failure, gone.usage.model_dump(mode="json"))
            if gone.failure.type is ErrorType.RAMBLING and times >= MOST_CUT:
                words = f"{gone.failure.message}. This happened {times} times, so this model is not asked again"
                raise ModelUnavailable(replace(gone.failure, message=words, retry=False)) from None
            raise
        return answer.to_json()

    settled = await protected(runtime.guards, call, act, tokens=_tokens)
    if settled.state is not State.DONE:
        raise ModelUnavailable(Failure(ErrorType(settled.error_type), settled.error))
    return ModelAnswer.from_json(settled.result)


def _named(answer: ModelAnswer, first: ModelClient, n: int, troubles: list[Failure]) -> ModelAnswer:
    """The answer, with its origin when another model than the first gave it."""
    if n == 0:
        return answer
    metrics.fallback("model", answer.model)
    return replace(answer, origin=f"in place of {first.model}: {troubles[0].message}")


def _larger(model: ModelClient, before: tuple[ModelClient, ...]) -> bool:
    return (model.window or 0) > max(each.window or 0 for each in before)


def _tokens(answer: Json) -> int:
    return answer["usage"].get("input_tokens", 0) + answer["usage"].get("output_tokens", 0)
