"""The codec alone: what it hides, what it refuses, and how it says so."""

from __future__ import annotations

import os
from base64 import b64encode

import pytest
from pydantic import SecretStr, ValidationError
from temporalio.api.common.v1 import Payload

from holdfast.contracts.failures import explain
from holdfast.engine.encryption import EncryptionCodec, PayloadUnreadable
from holdfast.setting_formats import parse_keys
from holdfast.settings import Settings

A, B = os.urandom(32), os.urandom(32)
PLAIN = Payload(metadata={"encoding": b"json/plain", "messageType": b"Secret"}, data=b'"Frau Quastenflosse"')


async def sealed(**keys: bytes) -> Payload:
    [payload] = await EncryptionCodec(keys).encode([PLAIN])
    return payload


async def opened(payload: Payload, **keys: bytes) -> Payload:
    [payload] = await EncryptionCodec(keys).decode([payload])
    return payload


async def test_what_is_encrypted_comes_back_whole_and_shows_nothing_but_the_key_id() -> None:
    payload = await sealed(a=A)
    assert dict(payload.metadata) == {"encoding": b"binary/encrypted", "encryption-key-id": b"a"}
    for secret in (b"Quastenflosse", b"Secret", b"json"):
        assert secret not in payload.SerializeToString()
    assert await opened(payload, a=A) == PLAIN


async def test_the_same_payload_is_never_the_same_twice() -> None:
    assert (await sealed(a=A)).data != (await sealed(a=A)).data


async def test_the_first_key_encrypts_and_all_decrypt() -> None:
    old = await sealed(a=A)
    new = await sealed(b=B, a=A)
    assert new.metadata["encryption-key-id"] == b"b"
    for payload in (old, new):
        assert await opened(payload, b=B, a=A) == PLAIN


async def test_what_is_not_encrypted_passes_and_without_keys_nothing_is_encrypted() -> None:
    assert await opened(PLAIN, a=A) == PLAIN
    assert await EncryptionCodec({}).encode([PLAIN]) == [PLAIN]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "encrypted with key 'a' (none is set here): add that key to HOLDFAST_ENCRYPTION_KEYS"),
        ({"b": B, "c": A}, "encrypted with key 'a' (here are: b, c): add that key to HOLDFAST_ENCRYPTION_KEYS"),
        ({"a": B}, "with key 'a' does not open: it was changed, or HOLDFAST_ENCRYPTION_KEYS has another key under"),
    ],
    ids=["no keys", "unknown id", "another key of the same id"],
)
async def test_a_key_that_is_missing_is_named_with_what_to_do(keys: dict[str, bytes], words: str) -> None:
    payload = await sealed(a=A)
    with pytest.raises(PayloadUnreadable) as caught:
        await opened(payload, **keys)
    assert words in str(caught.value)


@pytest.mark.parametrize("place", [0, 11, 12, 40, -1])
async def test_a_changed_byte_is_noticed(place: int) -> None:
    payload = await sealed(a=A)
    data = bytearray(payload.data)
    data[place] ^= 1
    payload.data = bytes(data)
    with pytest.raises(PayloadUnreadable, match="does not open: it was changed"):
        await opened(payload, a=A)


async def test_a_payload_cannot_be_passed_off_as_one_of_another_key() -> None:
    payload = await sealed(a=A)
    payload.metadata["encryption-key-id"] = b"b"
    with pytest.raises(PayloadUnreadable, match="does not open"):
        await opened(payload, b=A)


@pytest.mark.parametrize("data", [b"", b"short", b"x" * 12])
async def test_what_is_too_short_is_refused_in_words(data: bytes) -> None:
    payload = Payload(metadata={"encoding": b"binary/encrypted", "encryption-key-id": b"a"}, data=data)
    with pytest.raises(PayloadUnreadable, match="does not open"):
        await opened(payload, a=A)


def test_keys_are_read_in_their_order() -> None:
    text = f" new:{b64encode(A).decode()} ,\n old-1:{b64encode(B).decode()},"
    assert list(parse_keys(text).items()) == [("new", A), ("old-1", B)]
    assert parse_keys("") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b64encode(A).decode(), "entry 1 is not KEY_ID:KEY with a key of 32 bytes in base64"),
        (f"a:{b64encode(A[:16]).decode()}", "entry 1 is not KEY_ID:KEY"),
        (f"a:{b64encode(A).decode()},b c:{b64encode(B).decode()}", "entry 2 is not KEY_ID:KEY"),
        (f"a:{b64encode(A).decode()},a:{b64encode(B).decode()}", "key id a is there twice"),
    ],
    ids=["no id", "16 bytes", "blank in the id", "twice"],
)
def test_wrong_keys_are_refused_at_the_start_and_never_quoted(text: str, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(encryption_keys=SecretStr(text))
    assert words in explain(caught.value)
    for key in (A, A[:16], B):
        assert b64encode(key).decode() not in str(caught.value)
        assert b64encode(key).decode() not in explain(caught.value)
