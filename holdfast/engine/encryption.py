"""Encryption of Temporal payloads: AES-256-GCM over whole payloads, with key ids so that keys can be rotated.

Without keys nothing is encrypted, and an encrypted payload raises PayloadUnreadable. Payloads that are not encrypted
pass: a person may send a Signal by hand, and runs that began before encryption was turned on have to go on.

The encryption does not include the context (workflow, activity): the worker gives none, see
`holdfast.engine.client._Sandbox`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from temporalio.api.common.v1 import Payload
from temporalio.converter import PayloadCodec

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

ENCODING = b"binary/encrypted"
KEY_ID = "encryption-key-id"
NONCE = 12
"""Bytes. The nonce is random, so a key is safe for some billions of payloads: rotate it long before that."""

VARIABLE = "HOLDFAST_ENCRYPTION_KEYS"


class PayloadUnreadable(Exception):
    """A payload cannot be decrypted: its key is missing, or it was changed. The message is one line with what to do.

    A workflow or activity task that reads such a payload fails and is retried, so the run goes on once the key is set.
    """


class EncryptionCodec(PayloadCodec):
    """Encrypts with the first key, decrypts with all. Covers a payload with its metadata; only the key id is readable.

    The readable metadata is authenticated (AAD), so a payload cannot be presented as encrypted with another key.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._ciphers = _ciphers(keys)
        self._current = next(iter(keys), "")

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [self._encrypt(payload) for payload in payloads] if self._current else list(payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Raises PayloadUnreadable."""
        return [self._decrypt(p) if p.metadata.get("encoding") == ENCODING else p for p in payloads]

    def _encrypt(self, payload: Payload) -> Payload:
        nonce, id = os.urandom(NONCE), self._current
        sealed = self._ciphers[id].encrypt(nonce, payload.SerializeToString(), _aad(id))
        return Payload(metadata={"encoding": ENCODING, KEY_ID: id.encode()}, data=nonce + sealed)

    def _decrypt(self, payload: Payload) -> Payload:
        id = payload.metadata.get(KEY_ID, b"").decode(errors="replace")
        cipher = self._ciphers.get(id)
        if cipher is None:
            here = f"here are: {', '.join(self._ciphers)}" if self._ciphers else "none is set here"
            raise PayloadUnreadable(f"a payload is encrypted with key {id!r} ({here}): add that key to {VARIABLE}")
        from cryptography.exceptions import InvalidTag

        try:
            opened = cipher.decrypt(payload.data[:NONCE], payload.data[NONCE:], _aad(id))
            return Payload.FromString(opened)
        except (InvalidTag, ValueError, DecodeError):
            raise PayloadUnreadable(
                f"a payload encrypted with key {id!r} does not open: it was changed, or {VARIABLE} has another key "
                "under that id than the one that encrypted it"
            ) from None


def _ciphers(keys: Mapping[str, bytes]) -> dict[str, AESGCM]:
    if not keys:
        return {}
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # takes 8 MB, and most processes have no keys

    return {id: AESGCM(key) for id, key in keys.items()}


def _aad(id: str) -> bytes:
    return ENCODING + b"\0" + id.encode()
