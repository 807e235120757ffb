"""How the nodes of a turn ask the model: every question under a key of its own, all answers accounted for."""

from __future__ import annotations

from activities.model import ask_model
from holdfast.answers import ModelAnswer
from holdfast.contracts import Json, PlanRequest, Usage
from holdfast.runtime import Runtime
from holdfast.state.thread import Thread


class Asking:
    """The questions of one turn. Which model answered last goes with the turn's checkpoints."""

    def __init__(self, runtime: Runtime, request: PlanRequest, tag: str, thread: Thread, notes: list[str]) -> None:
        self._runtime = runtime
        self._request = request
        self._tag = tag
        self._thread = thread
        self._notes = notes
        self._usage = Usage()

    async def __call__(self, key: str, messages: list[Json], tools: list[Json]) -> ModelAnswer:
        request = self._request
        answer = await ask_model(
            self._runtime,
            messages,
            tools,
            key=f"{request.key_base}/turn-{self._tag}/{key}",
            key_base=request.key_base,
            name=f"turn-{request.turn}",
            digest=self._tag,
            timeout_s=self._runtime.settings.model_total_s + 10,
        )
        self._usage += answer.usage
        self._thread.carried = {**self._thread.carried, "model": _label(answer)}
        if answer.origin:
            self._notes.append(f"turn {request.turn}: {answer.model} answered, {answer.origin}")
        return answer

    async def account(self, *, resumed: bool) -> tuple[Usage, str]:
        """What the whole turn used, and its model: empty when it is that of the turn before, or none was asked.

        resumed: earlier attempts may have asked as well; the ledger knows.
        """
        carried, usage = self._thread.carried, self._usage
        model = carried.get("model", "")
        if resumed:
            found = await self._runtime.ledger.results(self._request.key_base, "model", self._tag)
            answers = [ModelAnswer.from_json(each) for each in found]
            usage = sum((each.usage for each in answers), Usage())
            model = model or (_label(answers[-1]) if answers else "")
        return usage, model if model != carried.get("before", "") else ""


def _label(answer: ModelAnswer) -> str:
    return f"{answer.label} (fallback)" if answer.origin else answer.label
