"""What the scripted model answers: a pure function of the messages and the offered tools.

An agent has its rules in `script.py` beside its `spec.py`: `decide(messages, tools)` returns the next assistant
message, or None when the conversation belongs to another agent. Agents without a script get a generic one. Every text
that it writes for people begins with `LABEL`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from traceback import extract_tb
from typing import Any

from holdfast.authoring.places import Place, places
from holdfast.contracts.data import Json

LABEL = "[simulated model] "

_LOG = logging.getLogger(__name__)

Call = tuple[str, Json]
"""A tool and its arguments."""
Script = Callable[[Sequence[Json], Sequence[Json]], Json | None]


class ScriptFailed(Exception):
    """An agent's script cannot be imported, or it raised. The message names the file, the error and the line."""


def decide(messages: Sequence[Json], tools: Sequence[Json]) -> Json:
    """The next assistant message. `messages` and `tools` as in a chat completion request.

    Raises ScriptFailed when a script fails and no other script takes the conversation.
    """
    failed: ScriptFailed | None = None
    for place, name in _there():
        try:
            message = _run(place, name, messages, tools)
        except ScriptFailed as error:
            # Every script sees every conversation: a broken one must not stop the others.
            _LOG.warning("%s", error, exc_info=error.__cause__)
            failed = failed or error
        else:
            if message is not None:
                return message
    if failed:
        raise failed
    talk = Talk.of(messages)
    if calls := _fillable(talk, tools):
        return ask(talk, *calls)
    return say(_stand_in(talk))


def scripts() -> list[Script]:
    """All scripts. Raises ScriptFailed for one that cannot be imported."""
    return [_script(place, name) for place, name in _there()]


@cache
def _there() -> list[tuple[Place, str]]:
    return [(place, name) for place in places().there for name in place.having("script.py")]


@cache
def _script(place: Place, name: str) -> Script:
    try:
        return import_module(f"{place.package}.{name}.script").decide
    except Exception as error:
        raise ScriptFailed(_words(place, name, error)) from error


def _run(place: Place, name: str, messages: Sequence[Json], tools: Sequence[Json]) -> Json | None:
    script = _script(place, name)
    try:
        message = script(messages, tools)
        if not isinstance(message, dict | None):
            raise TypeError(f"decide gave back {type(message).__name__}, neither a message nor None")
    except Exception as error:
        raise ScriptFailed(_words(place, name, error)) from error
    return message


def _words(place: Place, name: str, error: Exception) -> str:
    file = f"{name}/script.py"
    at = f"{place.folder.name}/{file}"
    lines = [each.lineno for each in extract_tb(error.__traceback__) if each.filename.endswith(at)]
    line = f" (line {lines[-1]})" if lines else ""
    return f"the script of {place.shown(file)} failed: {type(error).__name__}: {error}{line}"


def ask(talk: Talk, *calls: Call) -> Json:
    """The message that calls these tools at once."""
    tool_calls = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": tool, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for number, (tool, arguments) in enumerate(calls, talk.made + 1)
    ]
    return {"role": "assistant", "tool_calls": tool_calls}


def say(text: str) -> Json:
    """The message with this text, labelled."""
    return {"role": "assistant", "content": LABEL + text}


def offered(tools: Sequence[Json]) -> set[str]:
    """The names of the tools that a request offers."""
    return {each["function"]["name"] for each in tools}


# ------------------------------------------------------------------ reading the conversation


@dataclass(frozen=True)
class Try:
    """One tool call and its answer."""

    tool: str
    arguments: Json
    at: int
    """Index of the message that made the call."""
    answer: str

    @property
    def result(self) -> Any | None:
        """The answer's JSON; None when the answer is text, because then the call has no result."""
        # A line in brackets precedes the result of a fallback or of a call that a person edited.
        answer = re.sub(r"^(\[[^\n]*(, in place of | changed the arguments to )[^\n]*\]\n)+", "", self.answer)
        return value if isinstance(value := _json(answer), dict | list) else None

    @property
    def done(self) -> bool:
        return self.result is not None

    @property
    def skipped(self) -> bool:
        """Not run, because another call of the same turn was invalid."""
        return "another call of the same answer was invalid" in self.answer

    @property
    def invalid(self) -> bool:
        """The platform did not accept the arguments."""
        words = self.answer.lower()
        return not self.skipped and bool(re.match(r"bad arguments|error: the arguments", words))

    @property
    def refused(self) -> bool:
        """An error other than about the arguments' form, e.g. an unknown patient."""
        return not self.done and not self.skipped and not self.invalid and self.answer.lower().startswith("error")

    @property
    def unknown(self) -> bool:
        """The call may have taken effect: it must not be repeated."""
        return self.answer.startswith("outcome unknown")

    @property
    def rejection(self) -> str | None:
        """The reason for which a person rejected the call; None when it was not rejected."""
        found = re.match(r"(?:rejected|declined)\b[^:]*(?::\s*(.*))?$", self.answer, re.S | re.I)
        return (found[1] or "").strip() or "no reason given" if found else None


@dataclass(frozen=True)
class Talk:
    """The conversation so far."""

    data: Json
    """The JSON of the first user message."""
    tries: dict[str, list[Try]]
    """By tool. Calls that were undone, and calls of a turn that did not know of the undo, are left out."""
    notice: str
    """What the platform said since the model's last final message, such as that steps have no outcome."""
    noticed_at: int
    messages: list[str] = field(default_factory=list)
    """Messages from people to the run: 'dr.lee: …'."""
    made: int = 0
    """The number of calls so far."""

    @classmethod
    def of(cls, messages: Sequence[Json]) -> Talk:
        answers = {each["tool_call_id"]: _text(each) for each in messages if each["role"] == "tool"}
        first = next((_text(each) for each in messages if each["role"] == "user"), "")
        tries: dict[str, list[Try]] = {}
        ended, users, number = -1, 0, 0
        notice, noticed_at = "", -1
        for at, each in enumerate(messages):
            for call in each.get("tool_calls") or ():
                function = call["function"]
                arguments = _json(function["arguments"])
                made = Try(
                    function["name"], arguments if isinstance(arguments, dict) else {}, at, answers.get(call["id"], "")
                )
                number += 1
                if not made.answer.startswith("not done:"):
                    tries.setdefault(made.tool, []).append(made)
            if each["role"] == "assistant" and not each.get("tool_calls"):
                ended = at
            if each["role"] == "user":
                users += 1
                if users > 1:
                    again = _hear(_text(each), at, tries)
                    if again or (ended >= 0 and not _NEWS.match(_text(each))):
                        notice, noticed_at = _text(each), at
        data = _json(first)
        said = [_text(each).removeprefix(PERSON) for each in messages if _text(each).startswith(PERSON)]
        return cls(data if isinstance(data, dict) else {}, tries, notice, noticed_at, said, number)

    def last(self, tool: str) -> Try | None:
        return self.tries[tool][-1] if tool in self.tries else None

    def result(self, tool: str) -> Any | None:
        """The latest result of this tool."""
        return next((each.result for each in reversed(self.tries.get(tool, [])) if each.done), None)


_NEWS = re.compile(
    r"(?:Call #\d+ of (?P<late>\w+), deferred before, has ended: (?P<answer>.*))"
    r"|(?:.+ settled call #\d+ of (?P<settled>\w+): (?P<finding>.*))"
    r"|(?:Undone while this run was stopped, and no longer standing: (?P<undone>[^.]*))"
    r"|(?:Not available for now|Available again)|(?:Message from )",
    re.S,
)
"""The platform's notices on earlier calls, on tools that become unavailable or available, and messages from people."""
_NAMED = re.compile(r"#\d+ (\w+)")
PERSON = "Message from "


def _hear(text: str, at: int, tries: dict[str, list[Try]]) -> bool:
    """Takes a notice on an earlier call as its answer. Returns True when the call has to be made again."""
    news = _NEWS.match(text)
    if news and news["undone"]:
        for tool in _NAMED.findall(news["undone"]):
            tries[tool] = tries.get(tool, [])[:-1]
            if not tries[tool]:
                del tries[tool]
        return True
    tool = news and (news["late"] or news["settled"])
    if not news or not tool or tool not in tries:
        return False
    answer = news["answer"] or news["finding"]
    if happened := re.match(r"it happened\. (.*)", answer, re.S):
        answer = happened[1] if _json(happened[1]) is not None else json.dumps({"settled": happened[1]})
    last = tries[tool][-1]
    tries[tool][-1] = Try(tool, last.arguments, last.at, answer)
    return "Call it again" in answer


def _text(message: Json) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def transcript(messages: Sequence[Json]) -> str:
    """The full text of a conversation."""
    return "\n".join(_text(each) for each in messages)


def _json(text: str) -> Any | None:
    try:
        return json.loads(text)
    except ValueError:
        return None


# ------------------------------------------------------------------ any other agent


def _fillable(talk: Talk, tools: Sequence[Json]) -> list[Call]:
    """A call of each tool that was not called yet and whose required arguments are in the first user message."""
    calls: list[Call] = []
    for each in tools:
        name, schema = each["function"]["name"], each["function"].get("parameters") or {}
        known = {key: talk.data[key] for key in schema.get("properties", {}) if key in talk.data}
        if name not in talk.tries and all(key in known for key in schema.get("required", [])):
            calls.append((name, known))
    return calls


def _stand_in(talk: Talk) -> str:
    text = "I am a scripted stand-in without rules for this task; I call what the first message has the arguments for."
    text += "".join(f" Heard from {said}." for said in talk.messages)
    answers = [f"{tool}: {' '.join(tries[-1].answer.split())[:200]}" for tool, tries in talk.tries.items()]
    return f"{text} Answers: {' | '.join(answers)}" if answers else text
