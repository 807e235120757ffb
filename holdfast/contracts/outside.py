"""Limits for JSON from outside, the same for every source.

History, checkpoints, ledger and both databases can store and load all JSON within these limits. `problem` tells people
and models why a value is refused. `fitting` makes a tool's result fit: its call has already happened, so the result is
not refused.
"""

from __future__ import annotations

import json
import math
from typing import Any

from holdfast.contracts.data import whole

MAX_BYTES = 2_000_000
"""Bytes of one value as JSON. Temporal takes no larger payload."""
MAX_INPUT = 4_000_000
"""Bytes of a run's input: all of it goes to the model, and the run carries it."""
MAX_DEPTH = 64
"""Levels of lists and objects. JSON parsers stop at some 200 levels, and our messages add a few around a value."""
MAX_NODES = 100_000
"""Values inside one value, at all levels together."""
CUT = f"[cut: nested deeper than {MAX_DEPTH} levels]"
_DEEP = f"is nested deeper than {MAX_DEPTH} levels"


def problem(value: Any, max_bytes: int = MAX_BYTES) -> str:
    """Returns why a value is refused, to follow a name: 'is nested deeper than 64 levels'. Empty when accepted."""
    nodes, ahead = 0, [(value, 0)]
    while ahead:
        each, depth = ahead.pop()
        nodes += 1
        if nodes > MAX_NODES:
            return f"has more than {MAX_NODES:,} values"
        inside = [*each, *each.values()] if isinstance(each, dict) else each if isinstance(each, list | tuple) else ()
        if inside and depth == MAX_DEPTH:
            return _DEEP
        ahead += [(one, depth + 1) for one in inside]
        if said := _scalar_problem(each):
            return said
    try:
        size = len(json.dumps(value, ensure_ascii=False, default=str).encode())
    except (TypeError, ValueError) as error:
        return f"is no JSON: {error}"
    return f"has {size:,} bytes, and at most {max_bytes:,} are taken" if size > max_bytes else ""


def _scalar_problem(value: Any) -> str:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "has a number of more than 64 bits: write it as a text"
    if isinstance(value, float) and not math.isfinite(value):
        return f"has {value}, which is no JSON"
    if isinstance(value, str) and whole(value) != value:
        return "has half of a character (a lone surrogate)"
    return ""


def fitting(value: Any, depth: int = 0) -> Any:
    """Returns the value with each part that `problem` refuses replaced, by a note or by the closest JSON.

    It leaves the size as it is, and objects that are not JSON.
    """
    if isinstance(value, dict | list | tuple) and value and depth >= MAX_DEPTH:
        return CUT
    if isinstance(value, dict):
        return {
            whole(name) if isinstance(name, str) else name: fitting(each, depth + 1) for name, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [fitting(each, depth + 1) for each in value]
    if isinstance(value, str):
        return whole(value)
    return str(value) if _scalar_problem(value) else value


def loads(text: str, max_bytes: int = MAX_BYTES) -> Any:
    """Parses a JSON text. Raises ValueError, with text to follow a name, for invalid JSON and for a refused value."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_DEEP) from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    if wrong := problem(value, max_bytes):
        raise ValueError(wrong)
    return value
