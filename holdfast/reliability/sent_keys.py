"""Encodes idempotency keys for services: as text that fits an HTTP header, a query string and a file name.

A header takes only ASCII, but a request key can be any text (`--id Müller-3`). So Holdfast percent-encodes the key
before it gives it to a service: in the model's `Idempotency-Key`, and as `ctx.key` and `undo.key`. A tool thus sends
the same text in a header that it asks for later. Store, history and CLI keep the key as it is.
"""

from __future__ import annotations

import re

_ESCAPED = re.compile(r"%(?=[0-9A-Fa-f]{2})|[^\x20-\x7e]")
_ESCAPES = re.compile(rb"%([0-9A-Fa-f]{2})")


def outside(key: str) -> str:
    """Encodes a key for services: printable ASCII stays, each other byte of UTF-8 becomes `%` and two hex digits.

    Two keys never become the same text: a `%` that looks like an escape is escaped as well.
    """
    return _ESCAPED.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), key)


def inside(sent: str) -> str:
    """Decodes what `outside` encoded. Bytes that are not UTF-8 become U+FFFD; none of our keys has such bytes."""
    return _ESCAPES.sub(lambda found: bytes([int(found[1], 16)]), sent.encode()).decode(errors="replace")
