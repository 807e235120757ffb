"""The bare Temporal loop: the workflow keeps the messages, one model and one tool activity a turn, nothing guarded.

What a careful reader of Temporal's samples would write first, with the same model client and worker settings as ours.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from temporalio import activity, workflow

with workflow.unsafe.imports_passed_through():
    from pydantic import BaseModel

    from bench.cost import task
    from holdfast.reasoning.model_client import ModelClient

LIMIT = timedelta(seconds=60)


class Ask(BaseModel):
    messages: list[dict[str, Any]]


class Answer(BaseModel):
    message: dict[str, Any]


class Call(BaseModel):
    name: str
    arguments: dict[str, Any]


class Activities:
    def __init__(self, models: ModelClient) -> None:
        self._models = models

    @activity.defn(name="model")
    async def model(self, ask: Ask) -> Answer:
        info = activity.info()
        answer = await self._models.complete(ask.messages, task.TOOLS, key=f"{info.workflow_id}/{info.activity_id}")
        return Answer(message=answer.message)

    @activity.defn(name="tool")
    async def tool(self, call: Call) -> str:
        return {"record": task.record, "release": task.release}[call.name](**call.arguments)


@workflow.defn(name="BareLoop")
class BareLoop:
    def __init__(self) -> None:
        self._waiting = False
        self._decided = False

    @workflow.run
    async def run(self, prompt: str) -> str:
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": task.INSTRUCTIONS},
            {"role": "user", "content": prompt},
        ]
        while True:
            answer = await workflow.execute_activity_method(
                Activities.model, Ask(messages=messages), start_to_close_timeout=LIMIT
            )
            messages.append(answer.message)
            calls = answer.message.get("tool_calls")
            if not calls:
                return answer.message["content"]
            for made in calls:
                call = Call(name=made["function"]["name"], arguments=json.loads(made["function"]["arguments"]))
                if call.name == "release":
                    self._waiting = True
                    await workflow.wait_condition(lambda: self._decided)
                result = await workflow.execute_activity_method(Activities.tool, call, start_to_close_timeout=LIMIT)
                messages.append({"role": "tool", "tool_call_id": made["id"], "content": result})

    @workflow.signal
    def decide(self, decision: dict[str, Any]) -> None:
        self._decided = True

    @workflow.query
    def approvals(self) -> list[dict[str, Any]]:
        return [{"id": "a1"}] if self._waiting and not self._decided else []
