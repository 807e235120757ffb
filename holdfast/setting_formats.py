"""Settings with a format: encryption keys, addresses of payload storage, parameters of model requests, folders."""

from __future__ import annotations

import os
import re
from base64 import b64decode
from binascii import Error as Base64Error
from pathlib import Path
from urllib.parse import urlsplit

OURS = frozenset(
    {
        "model",
        "messages",
        "tools",
        "tool_choice",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "n",
    }
)
"""Request parameters that Holdfast sets itself."""
_ENTRY = re.compile(r"(?P<id>[A-Za-z0-9._-]{1,64}):(?P<key>[A-Za-z0-9+/]{43}=)")


def parse_keys(text: str) -> dict[str, bytes]:
    """Parses `id:base64,id:base64` into 32-byte keys by id, in order. Raises ValueError, whose text has no key."""
    keys: dict[str, bytes] = {}
    for number, entry in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
        found = _ENTRY.fullmatch(entry)
        try:
            key = b64decode(found["key"], validate=True) if found else b""
        except Base64Error:
            key = b""
        if found is None or len(key) != 32:
            raise ValueError(
                f"entry {number} is not KEY_ID:KEY with a key of 32 bytes in base64 (`openssl rand -base64 32` makes"
                " one); entries are separated by commas, a key id is up to 64 letters, digits and ._-"
            )
        if found["id"] in keys:
            raise ValueError(f"key id {found['id']} is there twice: give each key an id of its own")
        keys[found["id"]] = key
    return keys


STORE = "store"


def addresses(text: str) -> list[str]:
    """The checked addresses of `HOLDFAST_PAYLOAD_STORE`, at most one of each kind. Raises ValueError."""
    found = [part.strip() for part in text.split(",") if part.strip()] or [STORE]
    kinds = [kind(address) for address in found]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"{text}: one address of a kind only; move the content of the older one to the new one")
    return found


def kind(address: str) -> str:
    """`store`, `file` or `s3`. Raises ValueError."""
    url = urlsplit(address)
    if address == STORE:
        return STORE
    if (url.scheme == "file" and not url.netloc and len(url.path) > 1) or (url.scheme == "s3" and url.netloc):
        return url.scheme
    raise ValueError(f"{address!r} is none of store, file:///directory and s3://bucket/prefix")


def folders(text: str) -> list[Path]:
    """The folders of `HOLDFAST_AGENTS`, valid in any directory."""
    return [Path(part.strip()).expanduser().resolve() for part in text.split(os.pathsep) if part.strip()]
