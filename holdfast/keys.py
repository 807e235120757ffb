"""How an idempotency key leaves Holdfast: as text that fits an HTTP header, a query and a file name's alphabet alike.

A header takes ASCII only, and a request key may be any text (`--id Müller-3`). So the key is written with percent
escapes before anybody outside sees it: in the model's `Idempotency-Key`, and as `ctx.key` and `undo.key`, so that what
a tool sends in a header and what it asks for later are the same text. Store, history and CLI have the key as it is.
"""

from __future__ import annotations

import re

_ESCAPED = re.compile(r"%(?=[0-9A-Fa-f]{2})|[^\x20-\x7e]")
_ESCAPES = re.compile(rb"%([0-9A-Fa-f]{2})")


def outside(key: str) -> str:
    """The key as services get it: printable ASCII stays, the rest is `%` and two hex digits for each byte of UTF-8.

    Two keys never become the same text: a `%` that reads like an escape is escaped as well.
    """
    return _ESCAPED.sub(lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), key)


def inside(sent: str) -> str:
    """The key that `outside` has made this text of. Bytes that are no UTF-8 become U+FFFD: no key of ours has them."""
    return _ESCAPES.sub(lambda found: bytes([int(found[1], 16)]), sent.encode()).decode(errors="replace")
