"""JSON data in words, for people who decide on it."""

from __future__ import annotations

import json


def in_words(value: object, between: str = "; ") -> str:
    """`name: Ibuprofen, dosage: as needed; name: …`. between: what parts the items of a list that have parts."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {in_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        parts = any(isinstance(each, dict | list) for each in value)
        return (between if parts else ", ").join(in_words(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
