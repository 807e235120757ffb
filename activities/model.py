"""A model call through the protection chain, of a turn or of a tool, and down the chain of models when one is gone."""

from __future__ import annotations

from dataclasses import replace

from holdfast.answers import ModelAnswer, ModelUnavailable
from holdfast.contracts import Effect, Json
from holdfast.models import ModelClient, compacted, estimate
from holdfast.reliability.chain import protected
from holdfast.reliability.errors import ErrorType, Failure
from holdfast.reliability.ledger import Call, State
from holdfast.reliability.waiting import NotYet
from holdfast.runtime import Runtime
from holdfast.telemetry import metrics


async def ask_model(
    runtime: Runtime,
    messages: list[Json],
    tools: list[Json],
    *,
    key: str,
    key_base: str,
    name: str,
    digest: str,
    timeout_s: float,
) -> ModelAnswer:
    """The answer that is recorded under `key`, else that of the first model that gives one, recorded there.

    What happens when a model does not answer goes by the kind of failure. Gone, or its breaker open: the next model.
    The conversation is too long for it: the next one with a larger window, in the end a compacted conversation. It
    refuses by its policy: nobody else is asked.
    name: what crash points and readers of the ledger call it. digest: of what is asked.
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
            answer = await _ask(runtime, model, call, messages, tools, f"{key}/fb-{n}" if n else key)
        except NotYet as wait:
            if not wait.service:
                raise  # a rate limit says when, and the model is well
            waits.append(wait)
            troubles.append(Failure(ErrorType.UNAVAILABLE, wait.why))
        except ModelUnavailable as gone:
            if gone.failure.type is ErrorType.CONTENT_POLICY:
                raise
            troubles.append(gone.failure)
        else:
            return _named(answer, runtime.models[0], n, troubles)
    if any(t.type is ErrorType.CONTEXT_OVERFLOW for t in troubles) and (shorter := compacted(messages)):
        model = max(runtime.models, key=lambda each: each.window or 0)
        answer = await _ask(runtime, model, replace(call, key=f"{key}/compact"), shorter, tools, f"{key}/compact")
        return replace(answer, origin="from a compacted conversation: it was too long")
    if waits:
        raise min(waits, key=lambda wait: wait.delay)
    raise ModelUnavailable(troubles[0])


async def _ask(
    runtime: Runtime, model: ModelClient, call: Call, messages: list[Json], tools: list[Json], sent_as: str
) -> ModelAnswer:
    """Asks one model. The answer is kept under the call's key whoever gives it, so that a retry finds it first."""
    size = estimate(messages, tools) if model.window or model.service.tokens_per_minute else 0
    if model.window and size > model.window:
        words = f"the conversation has some {size} tokens and {model.model} takes {model.window}"
        raise ModelUnavailable(Failure(ErrorType.CONTEXT_OVERFLOW, words))
    limit = model.service.limit("default")
    call = replace(
        call,
        target=model.service.name,
        rule=model.service.breaker,
        limits=(limit,) if limit else (),
        tokens=size + model.usual_output,
    )

    async def act(attempt: int) -> Json:
        return (await model.complete(messages, tools, key=sent_as)).to_json()

    settled = await protected(runtime.guards, call, act, tokens=_tokens)
    if settled.state is not State.DONE:
        raise ModelUnavailable(Failure(ErrorType(settled.error_type), settled.error))
    return ModelAnswer.from_json(settled.result)


def _named(answer: ModelAnswer, first: ModelClient, n: int, troubles: list[Failure]) -> ModelAnswer:
    """The answer with its origin, when it is not the first model's."""
    if n == 0:
        return answer
    metrics.fallback("model", answer.model)
    return replace(answer, origin=f"in place of {first.model}: {troubles[0].message}")


def _larger(model: ModelClient, before: tuple[ModelClient, ...]) -> bool:
    return (model.window or 0) > max(each.window or 0 for each in before)


def _tokens(answer: Json) -> int:
    return answer["usage"].get("input_tokens", 0) + answer["usage"].get("output_tokens", 0)
