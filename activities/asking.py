"""How the nodes of a turn ask the model: each question has a key of its own, and the usage of all answers counts."""

from __future__ import annotations

from temporalio import activity

from activities.model import Wanted, ask_model, spent
from holdfast.authoring.options import AS_SET, ModelAnswer, ModelOptions
from holdfast.contracts.data import Json
from holdfast.contracts.turn import PlanRequest, Usage
from holdfast.engine.runtime import Runtime
from holdfast.reasoning.thread import Thread
from holdfast.reliability.ledger import State


class Asking:
    """The questions of one turn. The turn's checkpoints carry which model answered last."""

    def __init__(
        self,
        runtime: Runtime,
        request: PlanRequest,
        tag: str,
        thread: Thread,
        notes: list[str],
        options: ModelOptions = AS_SET,
    ) -> None:
        self._runtime = runtime
        self._request = request
        self._tag = tag
        self._thread = thread
        self._notes = notes
        self._options = options
        self._usage = Usage()
        self._cut = False

    async def __call__(self, key: str, messages: list[Json], tools: list[Json], must_call: bool) -> ModelAnswer:
        request = self._request
        answer = await ask_model(
            self._runtime,
            Wanted(messages, tools, self._options, must_call),
            key=f"{self._prefix}{key}",
            key_base=request.key_base,
            name=f"turn-{request.turn}",
            digest=self._tag,
            timeout_s=self._runtime.settings.model_total_s + 10,
            cut=self._was_cut,
        )
        self._usage += answer.usage
        self._thread.carried = {**self._thread.carried, "model": _label(answer)}
        if answer.origin:
            self._notes.append(f"turn {request.turn}: {answer.model} answered, {answer.origin}")
        return answer

    async def account(self, *, resumed: bool) -> tuple[Usage, str]:
        """The usage of the whole turn, and its model: empty if it is that of the turn before, or if none was asked.

        resumed: earlier attempts may have asked as well; then the usage comes from the ledger.
        """
        carried, usage = self._thread.carried, self._usage
        model = carried.get("model", "")
        if resumed or self._cut or self._request.tried or activity.info().attempt > 1:
            usage = await spent(self._runtime, self._request.key_base, self._prefix)
            if not model:
                calls = await self._runtime.ledger.models(self._request.key_base, self._prefix)
                answers = [ModelAnswer.from_json(each.result) for each in calls if each.state is State.DONE]
                model = _label(answers[-1]) if answers else ""
        return usage, model if model != carried.get("before", "") else ""

    @property
    def _prefix(self) -> str:
        return prefix_of(self._request.key_base, self._tag)

    def _was_cut(self) -> None:
        self._cut = True


def prefix_of(key_base: str, tag: str) -> str:
    """The prefix of the keys of all questions of a turn."""
    return f"{key_base}/turn-{tag}/"


def _label(answer: ModelAnswer) -> str:
    return f"{answer.label} (fallback)" if answer.origin else answer.label
