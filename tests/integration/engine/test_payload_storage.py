"""Where large payloads are kept: what is stored comes back, once, unchanged, or there is a word about it."""

from __future__ import annotations

import asyncio
import json
import os
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import httpx2
import pytest
from moto.server import ThreadedMotoServer
from pydantic import SecretStr, ValidationError
from temporalio.converter import DataConverter

from holdfast.contracts.failures import explain
from holdfast.engine import payload_storage
from holdfast.engine.client import data_converter
from holdfast.settings import Settings
from holdfast.state.database import Database
from holdfast.state.opening import open_database
from holdfast.state.payloads import StoredPayloads
from holdfast.testing.patience import PATIENCE_S

NAME = "Frau Quastenflosse"
LARGE = f"{NAME}. " * 10_000
KEYS = SecretStr(f"k1:{b64encode(os.urandom(32)).decode()}")


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """A real S3 over HTTP; its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"b-{uuid4().hex[:8]}"
    httpx2.put(f"{moto}/{bucket}", timeout=PATIENCE_S).raise_for_status()
    return f"s3://{bucket}/hold/fast"


@pytest.fixture(params=["sqlite", "postgresql", "file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings of each kind of storage."""
    store = {"file": f"file://{tmp_path}/claims%20here", "s3": ""}.get(request.param, "store")
    if request.param == "s3":
        store = request.getfixturevalue("s3")
    url = request.getfixturevalue("postgres_url" if request.param == "postgresql" else "sqlite_url")
    return Settings(payload_store=store, database_url=url)


@asynccontextmanager
async def converter(settings: Settings) -> AsyncIterator[DataConverter]:
    made = data_converter(settings, "default")
    try:
        yield made
    finally:
        await payload_storage.close(made.external_storage)


async def test_what_is_large_goes_there_and_comes_back_for_another_process(place: Settings) -> None:
    async with converter(place) as one, converter(place) as other:
        large, small = await one.encode([LARGE, "small"])
        assert large.ByteSize() < 500
        assert NAME.encode() not in large.SerializeToString()
        assert large.external_payloads[0].size_bytes > len(LARGE)
        assert small.data == b'"small"'
        assert await other.decode([large, small]) == [LARGE, "small"]


async def test_storing_twice_is_storing_once_also_at_the_same_time(place: Settings) -> None:
    async with converter(place) as one, converter(place) as other:
        found = await asyncio.gather(*(each.encode([LARGE]) for each in (one, other) * 4))
        assert len({payloads[0].data for payloads in found}) == 1
        assert await other.decode(found[0]) == [LARGE]


@pytest.mark.parametrize("keys", [KEYS, SecretStr("")], ids=["encrypted", "plain"])
async def test_what_is_stored_is_encrypted_when_encryption_is_on(
    tmp_path: Path, sqlite_url: str, keys: SecretStr
) -> None:
    store = f"file://{tmp_path}/claims"
    async with converter(Settings(payload_store=store, database_url=sqlite_url, encryption_keys=keys)) as one:
        payloads = await one.encode([LARGE])
        assert await one.decode(payloads) == [LARGE]
    [file] = (each for each in (tmp_path / "claims").rglob("*") if each.is_file())
    assert (NAME.encode() in file.read_bytes()) is not bool(keys.get_secret_value())


async def test_the_place_can_change_and_what_was_stored_before_is_still_read(tmp_path: Path, sqlite_url: str) -> None:
    file = f"file://{tmp_path}/claims"
    places = ("store", file, f"store,{file}")
    stored = []
    for place in places:
        async with converter(Settings(payload_store=place, database_url=sqlite_url)) as each:
            stored.append(await each.encode([LARGE + place]))
    async with converter(Settings(payload_store=places[-1], database_url=sqlite_url)) as last:
        assert [await last.decode(payloads) for payloads in stored] == [[LARGE + place] for place in places]


async def test_what_is_used_again_is_stored_again_so_that_deleting_by_age_spares_it(
    tmp_path: Path, sqlite_url: str, s3: str
) -> None:
    async with converter(Settings(payload_store=f"file://{tmp_path}/claims", database_url=sqlite_url)) as one:
        await one.encode([LARGE])
        [kept] = (each for each in (tmp_path / "claims").rglob("*") if each.is_file())
        os.utime(kept, (1000, 1000))
        await one.encode([LARGE])
        assert kept.stat().st_mtime > 1000
    async with converter(Settings(payload_store=s3, database_url=sqlite_url)) as one:
        [payload] = await one.encode([LARGE])
        key = json.loads(payload.data)["claimData"]["key"]
        bucket = payload_storage._S3("hold/fast")
        try:
            # Another content to tell it by: an object's age is told in seconds.
            await bucket.put_object(bucket=s3.split("/")[2], key=key, data=b"old")
            await one.encode([LARGE])
            assert len(await bucket.get_object(bucket=s3.split("/")[2], key=key)) > len(LARGE)
        finally:
            await bucket.close()


async def test_one_that_is_gone_is_an_error_that_says_what_to_do(tmp_path: Path, sqlite_url: str) -> None:
    async with converter(Settings(payload_store=f"file://{tmp_path}/claims", database_url=sqlite_url)) as one:
        payloads = await one.encode([LARGE])
    async with converter(Settings(payload_store=f"file://{tmp_path}/elsewhere", database_url=sqlite_url)) as other:
        with pytest.raises(
            payload_storage.PayloadLost, match=r"is not in .*/elsewhere: bring it back there .*HOLDFAST_PAYLOAD_STORE"
        ):
            await other.decode(payloads)


async def test_one_that_was_changed_is_not_taken(store_url: str) -> None:
    async with converter(Settings(database_url=store_url)) as one:
        payloads = await one.encode([LARGE])
        db = await open_database(store_url)
        await db.run("UPDATE claims SET payload = ?", b"something else")
        await db.close()
        with pytest.raises(payload_storage.PayloadLost, match="was changed in the store: bring it back from a backup"):
            await one.decode(payloads)


async def test_what_is_stored_again_is_young_again_and_only_its_namespace_clears_it(db: Database) -> None:
    kept = StoredPayloads(db)
    for digest, namespace in (("a", "ours"), ("b", "ours"), ("a", "theirs")):
        await kept.put(digest, namespace, b"12345")
    await db.run("UPDATE claims SET at = 1000")
    await kept.put("b", "ours", b"12345")
    assert await kept.size("ours") == (2, 10)
    assert await kept.size("ours", before=2000) == (1, 5)
    assert await kept.drop("ours", before=2000) == 1
    assert await kept.get("a") == b"12345", "the other namespace's runs still need it"
    assert await kept.drop("theirs", before=2000) == 1
    assert await kept.get("a") is None
    assert await kept.get("b") == b"12345"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("claims/here", "is none of store, file:///directory and s3://bucket/prefix"),
        ("file://claims", "is none of store, file:///directory"),
        ("s3:///prefix", "is none of store"),
        ("file:///a, file:///b", "one address of a kind"),
    ],
)
def test_a_wrong_address_is_refused_at_the_start(text: str, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(payload_store=text)
    assert words in explain(caught.value)
