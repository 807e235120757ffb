"""Encryption of what goes through Temporal: AES-256-GCM over whole payloads, with key ids so that keys can be rotated.

Without keys nothing is encrypted, and what was encrypted before is refused in words. Payloads that are not encrypted
pass: a person may type a Signal by hand, and runs that began before encryption was turned on go on.

No context (workflow, activity) is part of it: the worker does not tell one, see `holdfast.temporal._Sandbox`.
"""

from __future__ import annotations

import os
import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Mapping, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.protobuf.message import DecodeError
from temporalio.api.common.v1 import Payload
from temporalio.converter import PayloadCodec

ENCODING = b"binary/encrypted"
KEY_ID = "encryption-key-id"
NONCE = 12
"""Bytes. Random, so a key is good for some billions of payloads: rotate it long before that."""

VARIABLE = "HOLDFAST_ENCRYPTION_KEYS"
_ENTRY = re.compile(r"(?P<id>[A-Za-z0-9._-]{1,64}):(?P<key>[A-Za-z0-9+/]{43}=)")


class PayloadUnreadable(Exception):
    """A payload that cannot be decrypted: its key is not here, or it was changed. The text is one line of advice.

    A workflow or activity task that meets one fails and is tried again, so the run goes on once the key is there.
    """


def parse_keys(text: str) -> dict[str, bytes]:
    """Keys by id from `id:base64,id:base64`, in their order; 32 bytes each. Raises ValueError, which quotes no key."""
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
            raise ValueError(f"key id {found['id']} is there twice: a new key needs an id of its own")
        keys[found["id"]] = key
    return keys


class EncryptionCodec(PayloadCodec):
    """The first key encrypts, all decrypt. A payload is encrypted with its metadata; what stays readable is the key id.

    The readable metadata is authenticated (AAD), so a payload cannot be passed off as one of another key.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._ciphers = {id: AESGCM(key) for id, key in keys.items()}
        self._current = next(iter(keys), "")

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [self._encrypt(payload) for payload in payloads] if self._current else list(payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Raises PayloadUnreadable."""
        return [self._decrypt(p) if p.metadata.get("encoding") == ENCODING else p for p in payloads]

    def _encrypt(self, payload: Payload) -> Payload:
        nonce, id = os.urandom(NONCE), self._current
        sealed = self._ciphers[id].encrypt(nonce, payload.SerializeToString(), _bound(id))
        return Payload(metadata={"encoding": ENCODING, KEY_ID: id.encode()}, data=nonce + sealed)

    def _decrypt(self, payload: Payload) -> Payload:
        id = payload.metadata.get(KEY_ID, b"").decode(errors="replace")
        cipher = self._ciphers.get(id)
        if cipher is None:
            here = f"here are: {', '.join(self._ciphers)}" if self._ciphers else "none is set here"
            raise PayloadUnreadable(f"a payload is encrypted with key {id!r} ({here}): add that key to {VARIABLE}")
        try:
            opened = cipher.decrypt(payload.data[:NONCE], payload.data[NONCE:], _bound(id))
            return Payload.FromString(opened)
        except (InvalidTag, ValueError, DecodeError):
            raise PayloadUnreadable(
                f"a payload encrypted with key {id!r} does not open: it was changed, or {VARIABLE} has another key "
                "under that id than the one that encrypted it"
            ) from None


def _bound(id: str) -> bytes:
    return ENCODING + b"\0" + id.encode()
