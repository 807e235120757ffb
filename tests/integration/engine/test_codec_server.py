"""The codec server over real HTTP: who may read, what the Web UI and the `temporal` command get."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx2
import pytest
import uvicorn
from google.protobuf.json_format import MessageToDict
from pydantic import SecretStr
from temporalio.api.common.v1 import Payloads
from temporalio.client import Client
from temporalio.converter import DataConverter
from temporalio.testing import WorkflowEnvironment

from holdfast.engine import codec_server, payload_storage
from holdfast.engine.client import data_converter
from holdfast.settings import Settings
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.temporal import binary

UI = "http://localhost:8233"
TOKEN = "a long and random token"
KEYS = SecretStr(f"k1:{b64encode(os.urandom(32)).decode()}")
SECRET = "Frau Quastenflosse"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
async def converter(sqlite_url: str) -> AsyncIterator[DataConverter]:
    made = data_converter(Settings(encryption_keys=KEYS, database_url=sqlite_url), "default")
    yield made
    await payload_storage.close(made.external_storage)


@pytest.fixture
async def http(converter: DataConverter) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a running server."""
    config = uvicorn.Config(codec_server.app(converter, TOKEN, [UI]), port=0, log_level="error")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
        yield client
    server.should_exit = True
    await task


async def body(converter: DataConverter, *values: Any) -> dict[str, Any]:
    """Values as the server has them, in the protocol's JSON."""
    return MessageToDict(Payloads(payloads=await converter.encode(values)))


def data(answer: httpx2.Response) -> list[Any]:
    """The values in an answer of plain payloads."""
    assert answer.status_code == 200, answer.text
    payloads = Payloads()
    codec_server.Parse(answer.content, payloads)
    assert {bytes(p.metadata["encoding"]) for p in payloads.payloads} == {b"json/plain"}
    return [json.loads(p.data) for p in payloads.payloads]


async def test_decodes_for_a_bearer_and_encodes_what_it_decodes(
    http: httpx2.AsyncClient, converter: DataConverter
) -> None:
    given = await body(converter, SECRET, {"n": 1})
    plain = await http.post("/decode", json=given, headers={**BEARER, "x-namespace": "default"})
    assert data(plain) == [SECRET, {"n": 1}]
    sealed = await http.post("/encode", json=plain.json(), headers=BEARER)
    assert SECRET not in sealed.text
    assert data(await http.post("/decode", json=sealed.json(), headers=BEARER)) == [SECRET, {"n": 1}]


@pytest.mark.parametrize("path", ["/decode", "/encode", "/download"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {TOKEN}"},
        {"cookie": "holdfast-codec=x"},
    ],
    ids=["nothing", "wrong", "empty", "basic", "cookie"],
)
async def test_without_the_token_nothing_is_read(
    http: httpx2.AsyncClient, converter: DataConverter, path: str, headers: dict[str, str]
) -> None:
    answer = await http.post(path, json=await body(converter, SECRET), headers=headers)
    assert answer.status_code == 401
    assert SECRET not in answer.text


async def test_a_browser_that_has_signed_in_may_read_from_the_web_uis_page_only(
    http: httpx2.AsyncClient, converter: DataConverter
) -> None:
    assert (await http.post("/", data={"token": "wrong"})).status_code == 401
    signed = await http.post("/", data={"token": TOKEN})
    assert signed.status_code == 303
    for word in ("HttpOnly", "SameSite=strict"):
        assert word in signed.headers["set-cookie"]
    assert "You are signed in." in (await http.get("/")).text
    given = await body(converter, SECRET)
    answer = await http.post("/decode", json=given, headers={"origin": UI})
    assert data(answer) == [SECRET]
    assert answer.headers["access-control-allow-origin"] == UI
    assert answer.headers["access-control-allow-credentials"] == "true"
    stranger = await http.post("/decode", json=given, headers={"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in stranger.headers
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,x-namespace"}
    assert (await http.options("/decode", headers={"origin": UI, **asks})).status_code == 200
    assert (await http.options("/decode", headers={"origin": "http://evil.example", **asks})).status_code == 400


async def test_a_payload_that_was_put_elsewhere_is_fetched_unless_asked_otherwise(
    http: httpx2.AsyncClient, converter: DataConverter
) -> None:
    given = await body(converter, SECRET * 100_000)
    left = (await http.post("/decode?preserveStorageRefs=true", json=given, headers=BEARER)).json()
    assert left == given
    assert int(left["payloads"][0]["externalPayloads"][0]["sizeBytes"]) > 1_800_000
    for path in ("/download", "/decode"):
        assert data(await http.post(path, json=given, headers=BEARER)) == [SECRET * 100_000]


async def test_one_payload_of_an_unknown_key_does_not_hide_the_others(
    http: httpx2.AsyncClient, converter: DataConverter, sqlite_url: str
) -> None:
    other = data_converter(
        Settings(encryption_keys=SecretStr(f"k0:{b64encode(os.urandom(32)).decode()}"), database_url=sqlite_url), "x"
    )
    given = {"payloads": [*(await body(converter, SECRET))["payloads"], *(await body(other, "old"))["payloads"]]}
    first, second = data(await http.post("/decode", json=given, headers=BEARER))
    assert first == SECRET
    assert "not readable: a payload is encrypted with key 'k0' (here are: k1)" in second


@pytest.mark.parametrize("trouble", ["unknown place", "store down"])
async def test_one_payload_that_cannot_be_fetched_does_not_hide_the_others(
    http: httpx2.AsyncClient, converter: DataConverter, sqlite_url: str, trouble: str
) -> None:
    [good] = (await body(converter, SECRET))["payloads"]
    [large] = (await body(converter, SECRET * 100_000))["payloads"]
    if trouble == "unknown place":
        reference = json.loads(b64decode(large["data"])) | {"driverName": "nobody"}
        large["data"] = b64encode(json.dumps(reference).encode()).decode()
    else:
        await payload_storage.close(converter.external_storage)
        os.unlink(sqlite_url.removeprefix("sqlite:///"))  # noqa: PTH108
    first, second = data(await http.post("/decode", json={"payloads": [good, large]}, headers=BEARER))
    assert first == SECRET
    assert ("No driver found" if trouble == "unknown place" else "no store at") in second
    assert (await http.post("/download", json={"payloads": [large]}, headers=BEARER)).status_code == 400


async def test_nobody_fills_the_servers_memory(http: httpx2.AsyncClient) -> None:
    async def megabytes(number: int) -> AsyncIterator[bytes]:
        for _ in range(number):
            yield b"x" * 1_000_000

    for path, headers, number in (("/", {}, 2), ("/decode", BEARER, 65)):
        answer = await http.post(path, content=megabytes(number), headers=headers)
        assert answer.status_code == 413


async def test_a_cookie_for_pages_of_https_is_sent_over_nothing_else(converter: DataConverter) -> None:
    for origin, secure in ((UI, False), ("https://temporal.example.org", True)):
        transport = httpx2.ASGITransport(codec_server.app(converter, TOKEN, [origin]))
        async with httpx2.AsyncClient(transport=transport, base_url="http://behind-a-proxy") as client:
            signed = await client.post("/", data={"token": TOKEN})
        assert ("Secure" in signed.headers["set-cookie"]) is secure


@pytest.mark.parametrize("text", ["", "{", '{"payloads": 1}', "\udcff"])
async def test_what_is_no_payload_is_refused_in_words(http: httpx2.AsyncClient, text: str) -> None:
    raw = text.encode("utf-8", "surrogateescape")
    answer = await http.post("/decode", content=raw, headers=BEARER)
    assert (answer.status_code, "not payloads as JSON" in answer.text) == (400, True)


async def test_the_temporal_command_reads_and_writes_through_it(
    http: httpx2.AsyncClient, converter: DataConverter, temporal: WorkflowEnvironment
) -> None:
    client = await Client.connect(temporal.client.service_client.config.target_host, data_converter=converter)
    handle = await client.start_workflow("Nobody", SECRET, id=f"w-{uuid4().hex}", task_queue="nobody")
    codec = ["--codec-endpoint", str(http.base_url), "--codec-auth", BEARER["authorization"]]
    at = ["--workflow-id", handle.id, "--address", client.service_client.config.target_host, *codec]

    async def run(*command: str) -> str:
        done = await asyncio.to_thread(
            subprocess.run, [binary("temporal"), "workflow", *command, *at], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    await run("signal", "--name", "say", "--input", '"Kunigunde"')
    raw = str((await handle.fetch_history()).to_json())
    assert b64encode(b"Kunigunde").decode() not in raw
    assert "binary/encrypted" not in await run("show", "--output", "json")
    shown = await run("show", "--output", "json")
    for word in (SECRET, "Kunigunde"):
        assert b64encode(json.dumps(word).encode()).decode() in shown or word in shown
    await handle.terminate()
