"""A model call through the protection chain: of a turn, or of a tool."""

from __future__ import annotations

from holdfast.contracts import Effect, Json
from holdfast.models import ModelAnswer, ModelUnavailable
from holdfast.reliability.chain import protected
from holdfast.reliability.errors import ErrorType, Failure
from holdfast.reliability.ledger import Call, State
from holdfast.runtime import Runtime


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
    """The answer that is recorded under `key`, else the model's own, recorded there.

    name: what crash points and readers of the ledger call it. digest: of what is asked.
    Raises RetryLater, and ModelUnavailable when the retries are used up or would not help.
    """
    call = Call(
        key=key,
        key_base=key_base,
        kind="model",
        name=name,
        effect=Effect.IDEMPOTENT,
        arguments=None,
        digest=digest,
        service="model",
        timeout_s=timeout_s,
    )

    async def act(attempt: int) -> Json:
        return (await runtime.models.complete(messages, tools, key=key)).to_json()

    settled = await protected(runtime.ledger, call, act)
    if settled.state is not State.DONE:
        raise ModelUnavailable(Failure(ErrorType(settled.error_type), settled.error))
    return ModelAnswer.from_json(settled.result)
