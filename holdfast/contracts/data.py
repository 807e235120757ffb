"""JSON data and texts as they cross the workflow boundary."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

Json = dict[str, Any]


def digest(value: Any) -> str:
    """Returns a short stable digest of JSON data, the same for any order of the keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return sha256(text.encode()).hexdigest()[:16]


def whole(text: str) -> str:
    """Returns the text as valid UTF-8: joins surrogate pairs, and replaces lone surrogates by U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def clip(text: str, limit: int) -> str:
    """Returns the text as valid UTF-8, cut to `limit` bytes with a note that says so."""
    text = whole(text)
    raw = text.encode()
    if len(raw) <= limit:
        return text
    kept = raw[:limit].decode(errors="ignore")
    return f"{kept}\n[cut: the result has {len(raw)} bytes, {limit} are shown; ask for less]"
