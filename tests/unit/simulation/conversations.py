"""Plays a conversation between the scripted model and tools whose answers a test chooses."""

from __future__ import annotations

import json
from typing import Any

from holdfast.authoring.registry import agent
from holdfast.contracts.data import Json
from holdfast.dev.simulation.hospital import PATIENTS
from holdfast.dev.simulation.script import decide


def bundle(*resources: Json) -> Json:
    return {"resourceType": "Bundle", "entry": [{"resource": each} for each in resources]}


class Conversation:
    """The discharge agent's conversation. `answers`: per tool, its answer or a list of answers in turn."""

    def __init__(self, patient_id: str = "pat-1", offered: set[str] | None = None, **answers: Any) -> None:
        spec = agent("discharge")
        self.messages: list[Json] = spec.messages({"patient_id": patient_id})
        self.tools = [each.openai for each in spec.tools if offered is None or each.name in offered]
        path = PATIENTS / f"{patient_id}.json"
        resources = [each["resource"] for each in json.loads(path.read_text())["entry"]] if path.exists() else []
        self._answers: dict[str, Any] = {
            "read_record": bundle(
                *(r for r in resources if r["resourceType"] in ("Patient", "Encounter", "Condition"))
            ),
            "read_orders": bundle(*(r for r in resources if r["resourceType"].endswith("Request"))),
            "verify_insurance": {"coverage": "active", "payor": "Imaginary Health Plan"},
            "order_medication": {"status": "placed"},
            "book_appointment": {"status": "placed"},
            "write_summary": {"text": "[simulated model] All is well.", "written_by": "model scripted-1"},
            "notify_patient": {"status": "sent"},
            "notify_providers": {"status": "sent"},
        } | answers
        self.calls: list[list[tuple[str, Json]]] = []
        """The calls of each turn; every one of them fits its tool's schema."""

    def turn(self) -> str | None:
        """Lets the model speak once and answers its calls. Returns its final words when it ends."""
        message = decide(self.messages, self.tools)
        self.messages.append(message)
        if "tool_calls" not in message:
            return message["content"]
        made = []
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            agent("discharge").by_name[name].validate(arguments)
            made.append((name, arguments))
            answer = self._answers[name]
            if isinstance(answer, list):
                answer = answer.pop(0) if len(answer) > 1 else answer[0]
            text = answer if isinstance(answer, str) else json.dumps(answer)
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})
        self.calls.append(made)
        return None

    def play(self) -> str:
        """Plays until the model ends; its final words."""
        for _ in range(12):
            if (final := self.turn()) is not None:
                return final
        raise AssertionError(f"never ended: {[[name for name, _ in turn] for turn in self.calls]}")

    @property
    def turns(self) -> list[set[str]]:
        return [{name for name, _ in turn} for turn in self.calls]

    def of(self, tool: str) -> list[Json]:
        """The arguments of all calls of this tool."""
        return [arguments for turn in self.calls for name, arguments in turn if name == tool]
