"""The scripted model as a weak model, by seed: it rambles, is cut, ignores tools, garbles JSON, repeats, stops early.

    python -m holdfast.dev.simulation.scripted_model --port 8091 --db model.db --weak 7

The seed, the run's workflow id and the number of the request in its run determine what it does, so a seed always gives
the same model. The share of bad answers differs by run: some models fail now and then, some always.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from holdfast.contracts.data import Json

Kind = Literal["well", "rambles", "cut", "ignores tools", "garbles", "repeats", "stops early", "calls what is none"]
KINDS: tuple[Kind, ...] = (
    "rambles",
    "cut",
    "ignores tools",
    "garbles",
    "repeats",
    "stops early",
    "calls what is none",
)
SHARES = (0.05, 0.2, 0.5, 1.0)
"""The share of a run's requests that go wrong: each run gets one of these."""
RAMBLE = "and so on and on, as was said before, " * 2000
"""The text of an endless stream."""


@dataclass(frozen=True)
class Said:
    kind: Kind
    message: Json
    finish: str = ""
    """Finish reason; empty: the one that follows from the message."""


def weak(seed: int, run: str, number: int, message: Json, messages: Sequence[Json]) -> Said:
    """A weak model's answer instead of `message`. run: its workflow id. number: of the request in its run."""
    share = random.Random(f"{seed} {run}").choice(SHARES)
    chance = random.Random(f"{seed} {run} {number}")
    kind: Kind = chance.choice(KINDS) if chance.random() < share else "well"
    return _said(kind, message, messages, chance)


def _said(kind: Kind, message: Json, messages: Sequence[Json], chance: random.Random) -> Said:
    text = message.get("content") or ""
    calls = message.get("tool_calls") or []
    match kind:
        case "cut":
            half = {**message, "content": text[: len(text) // 2]} if text else message
            if calls:
                half = {**half, "tool_calls": [*calls[:-1], _with(calls[-1], calls[-1]["function"]["arguments"][:-3])]}
            return Said(kind, half, "length")
        case "ignores tools" if calls:
            names = ", ".join(each["function"]["name"] for each in calls)
            return Said(kind, _words(f"I would now call {names}."))
        case "garbles":
            if calls:
                return Said(kind, {**message, "tool_calls": [_with(each, "patient: one, please") for each in calls]})
            return Said(kind, _words(f"Sure! Here it is: {text[: chance.randrange(1, 40)]}"))
        case "repeats":
            before = [each for each in messages if each["role"] == "assistant"]
            return Said(kind, chance.choice(before) if before else message)
        case "stops early":
            return Said(kind, _words("All done."))
        case "calls what is none":
            function = {"name": "do_everything", "arguments": json.dumps({"now": True})}
            call = {"id": "x", "type": "function", "function": function}
            return Said(kind, {"role": "assistant", "tool_calls": [call]})
        case _:
            return Said(kind, message)


def _words(text: str) -> Json:
    return {"role": "assistant", "content": text}


def _with(call: Json, arguments: str) -> Json:
    return {**call, "function": {**call["function"], "arguments": arguments}}
