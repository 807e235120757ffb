"""Messages of a conversation with a model, as OpenAI dicts, and the checks of a model's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from holdfast.authoring.agent import AgentSpec
from holdfast.contracts import outside
from holdfast.contracts.data import Json
from holdfast.contracts.failures import explain
from holdfast.contracts.turn import Decision, ToolCall
from holdfast.contracts.wording import did_you_mean

MAX_REASKS = 2
CUT = "cut"
"""Key that marks an assistant message as cut at its token limit. It is never sent."""
MAX_ARGUMENTS = 1_000_000
"""Bytes of a call's arguments, as JSON."""
MAX_TOGETHER = 2_000_000
"""Bytes of the arguments of all calls of an answer. One message schedules them all, and Temporal terminates a run whose
message exceeds 4 MB."""
MAX_FINAL = 1_000_000
"""Bytes of the final answer."""
WAS_CUT = (
    "Your answer was cut at its limit before it was complete, so nothing of it was taken. Answer again, shorter: a few"
    " words, or fewer calls at a time."
)
FEWER = "Choose the calls that come first; make the others when you have read what these answered."


class MalformedOutput(Exception):
    """The model's output stayed invalid after all re-asks."""


def as_json(message: Any) -> Json:
    """Returns a message as an OpenAI dict; converts LangChain's messages."""
    if isinstance(message, dict):
        return message
    from langchain_core.messages import convert_to_openai_messages

    converted = convert_to_openai_messages([message])[0]
    if getattr(message, "invalid_tool_calls", None):
        # The conversion drops them, but the model must be told. `RecordedChatModel` keeps them in additional_kwargs.
        converted["tool_calls"] = message.additional_kwargs.get("tool_calls", [])
    if getattr(message, "response_metadata", {}).get("finish_reason") == "length":
        converted[CUT] = True
    return converted


def inbox_messages(conversation: Sequence[Json], answers: Sequence[str], notices: Sequence[str]) -> list[Json]:
    """Returns the messages that a model must get next: the answers to the conversation's last calls, then notices."""
    made = conversation[-1].get("tool_calls") or [] if conversation else []
    told = [
        {"role": "tool", "tool_call_id": call["id"], "content": text} for call, text in zip(made, answers, strict=True)
    ]
    return told + [{"role": "user", "content": text} for text in notices]


def parse(message: Json, spec: AgentSpec, offered: set[str] | None = None) -> tuple[Decision | None, list[Json]]:
    """Returns the decision in a model's message, or None and the messages that tell the model what is wrong."""
    wanted = message.get("tool_calls") or []
    if message.get(CUT):
        told = [{"role": "tool", "tool_call_id": call["id"], "content": f"error: {WAS_CUT}"} for call in wanted]
        return None, told or [{"role": "user", "content": WAS_CUT}]
    if not wanted:
        text = said(message)
        if (size := len(text.encode())) > MAX_FINAL:
            problem = f"Your answer has {size:,} bytes, and at most {MAX_FINAL:,} are taken: say it shorter."
            return None, [{"role": "user", "content": problem}]
        if text:
            return Decision(final=text), []
        return None, [{"role": "user", "content": "Your answer was empty. Call a tool, or say how the task ended."}]
    if len(wanted) > spec.max_calls:
        *others, last = (call["id"] for call in wanted)
        short = "error: not run: too many calls in one answer"
        words = f"{short}: {len(wanted):,}, and at most {spec.max_calls} are taken. {FEWER}"
        told = [(each, short) for each in others] + [(last, words)]
        return None, [{"role": "tool", "tool_call_id": each, "content": text} for each, text in told]
    parsed = [(call["id"], *_parse_call(call, spec, offered)) for call in wanted]
    kept = "not run, because another call of the same answer was invalid; send all the calls again"
    if all(good is not None for _, good, _ in parsed):
        size = sum(len(call["function"]["arguments"].encode()) for call in wanted)
        if size <= MAX_TOGETHER:
            return Decision(calls=[good for _, good, _ in parsed if good is not None]), []
        kept = (
            f"not run: the arguments of all calls together have {size:,} bytes, and at most {MAX_TOGETHER:,} are taken:"
        )
        kept += " send fewer calls at a time"
    return None, [
        {"role": "tool", "tool_call_id": call_id, "content": f"error: {problem or kept}"}
        for call_id, _, problem in parsed
    ]


def said(message: Json) -> str:
    """Returns the text of a message."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content.strip()


def _parse_call(call: Json, spec: AgentSpec, offered: set[str] | None) -> tuple[ToolCall | None, str]:
    name = call["function"]["name"]
    tool = spec.by_name.get(name)
    if tool is None or (offered is not None and name not in offered):
        known = [each for each in spec.by_name if offered is None or each in offered]
        return None, f"there is no tool named {name!r}; the tools are: {', '.join(known)}{did_you_mean(name, known)}"
    if (size := len(call["function"]["arguments"].encode())) > MAX_ARGUMENTS:
        return None, f"the arguments of {name} have {size:,} bytes, and at most {MAX_ARGUMENTS:,} are taken: send less"
    try:
        # Stricter than `json`: refuses lone surrogates and NaN, which history cannot hold.
        arguments: Any = from_json(call["function"]["arguments"] or "{}", allow_inf_nan=False)
    except ValueError as error:
        return None, f"the arguments of {name} are not valid JSON ({error}); send the call again"
    if wrong := outside.problem(arguments, MAX_ARGUMENTS):
        return None, f"the arguments of {name} are not taken: the JSON {wrong}; send the call again"
    try:
        valid = tool.validate(arguments)
    except ValidationError as error:
        return None, f"the arguments of {name} do not fit its schema: {explain(error)}"
    return ToolCall(tool=name, arguments=valid, version=tool.version), ""


def again(tries: int, problems: Sequence[Json]) -> int:
    if tries >= MAX_REASKS:
        words = f"the model's output was invalid {tries + 1} times in a row; the last error: {problems[-1]['content']}"
        raise MalformedOutput(words)
    return tries + 1
