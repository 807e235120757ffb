"""Any cluster: TLS and API key by the standard profile, errors in words, several namespaces, slots by resources."""

import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest, RegisterNamespaceRequest
from temporalio.client import Client
from temporalio.service import OperatorService, RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment

from holdfast.cli.doctor import _temporal as temporal_checks
from holdfast.contracts.run import RunOutcome
from holdfast.engine.client import DATA_CONVERTER, SEARCH_ATTRIBUTES, NoServer, connect, missing_search_attributes
from holdfast.engine.worker import check, slots
from holdfast.recovery.orphans import find_orphans
from holdfast.settings import settings
from holdfast.testing.model import call, say, sequence
from holdfast.testing.stage import Stage, until
from tests.fixtures.tls import Authority, refusing, server_side, tls_proxy
from tests.fixtures.world import World, agent
from workflows.serving import make_worker

HUFFMAN = {"B": "1011101", "e": "00101", "a": "00011", "r": "101100", " ": "010100", "b": "100011"}
"""How HTTP/2 writes these letters (RFC 7541, appendix B)."""


def on_the_wire(text: str) -> bytes:
    bits = "".join(HUFFMAN[letter] for letter in text)
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


class Profile:
    """The profile of the Temporal CLI that `connect` reads."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(
        self, address: str, ca: Path | None = None, client: tuple[Path, Path] | None = None, key: str = ""
    ) -> None:
        lines = ["[profile.default]", f'address = "{address}"', 'namespace = "default"']
        lines += [f'api_key = "{key}"'] if key else []
        lines += ["[profile.default.tls]"] if ca or client else []
        lines += [f'server_ca_cert_path = "{ca}"'] if ca else []
        lines += [f'client_cert_path = "{client[0]}"', f'client_key_path = "{client[1]}"'] if client else []
        self.file.write_text("\n".join(lines) + "\n")


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Profile]:
    for name in ("TEMPORAL_ADDRESS", "TEMPORAL_NAMESPACE", "TEMPORAL_API_KEY", "TEMPORAL_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEMPORAL_CONFIG_FILE", str(tmp_path / "temporal.toml"))
    settings.cache_clear()
    yield Profile(tmp_path / "temporal.toml")
    settings.cache_clear()


def host(temporal: WorkflowEnvironment) -> str:
    return temporal.client.service_client.config.target_host.replace("localhost", "127.0.0.1")


async def test_a_run_over_tls_with_a_client_certificate_and_an_api_key(
    temporal: WorkflowEnvironment, lite: Stage, authority: Authority, profile: Profile
) -> None:
    world = World()
    spec = agent(world.tool("book"))
    lite.model.script = sequence(call(("book", {})), say("done"))
    async with tls_proxy(host(temporal), server_side(authority.issue("server"), authority.ca)) as proxy:
        profile.write(proxy.address, authority.ca, authority.issue("client"), key="bear")
        secured = Stage(await connect(), lite.runtime, lite.model, lite.queue)
        async with secured.worker():
            result = await (await secured.start(spec)).result()
    assert result.outcome is RunOutcome.COMPLETED
    assert on_the_wire("Bearer bear") in proxy.sent


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no client certificate", "no client certificate is set: check the client certificate"),
        ("expired client certificate", "ended the connection; the client certificate is valid until 20"),
        ("unknown authority", "is not one that this machine trusts.*TEMPORAL_TLS_SERVER_CA_CERT_PATH"),
        ("no tls", "if it needs TLS, set TEMPORAL_TLS=true"),
        ("expired server certificate", "certificate of 127.0.0.1:[0-9]+ has expired"),
        ("server without tls", "does not speak TLS"),
    ],
)
async def test_a_connection_that_cannot_be_is_said_in_words(
    temporal: WorkflowEnvironment, authority: Authority, profile: Profile, tmp_path: Path, case: str, words: str
) -> None:
    ca, client = authority.ca, authority.issue("client", days=-1 if "expired client" in case else 1)
    server = authority.issue("server", days=-1 if "expired server" in case else 1)
    (tmp_path / "other").mkdir()
    async with tls_proxy(host(temporal), server_side(server, ca)) as proxy:
        match case:
            case "no client certificate":
                profile.write(proxy.address, ca)
            case "unknown authority":
                profile.write(proxy.address, Authority(tmp_path / "other").ca, client)
            case "no tls":
                profile.write(proxy.address)
            case "server without tls":
                profile.write(host(temporal), ca, client)
            case _:
                profile.write(proxy.address, ca, client)
        with pytest.raises(NoServer, match=words):
            await connect()


@pytest.mark.parametrize(("status", "says"), [(7, "Request unauthorized."), (16, "invalid key")])
async def test_a_wrong_key_is_said_in_words(authority: Authority, profile: Profile, status: int, says: str) -> None:
    async with refusing(status, says, server_side(authority.issue("server"), None)) as address:
        profile.write(address, authority.ca, key="wrong")
        with pytest.raises(NoServer, match=rf"refuses the key or the certificate \({says}\): check TEMPORAL_API_KEY"):
            await connect()


async def test_a_worker_starts_where_the_operator_service_is_not_for_users(
    temporal: WorkflowEnvironment, lite: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Temporal Cloud. Its refusal is the only part that is not real here."""

    async def refuse(*_: object, **__: object) -> None:
        raise RPCError("operator service is not available", RPCStatusCode.UNIMPLEMENTED, b"")

    monkeypatch.setattr(OperatorService, "list_search_attributes", refuse)
    monkeypatch.setattr(OperatorService, "add_search_attributes", refuse)
    monkeypatch.setenv("DATABASE_URL", lite.runtime.settings.database_url)
    settings.cache_clear()
    try:
        await check(temporal.client)
        assert await missing_search_attributes(temporal.client) == []
        bare = await namespace(temporal.client, searchable=False)
        assert set(await missing_search_attributes(bare)) == {key.name for key in SEARCH_ATTRIBUTES}
        found = {each.what: each for each in await temporal_checks(bare, fix=True)}
    finally:
        settings.cache_clear()
    assert "tcld namespace search-attributes add" in found["search attributes"].to_do
    assert found["orphan sweep"].ok


async def test_a_wrong_namespace_is_said_in_words(temporal: WorkflowEnvironment) -> None:
    wrong = await Client.connect(host(temporal), namespace="elsewhere", data_converter=DATA_CONVERTER)
    found = await temporal_checks(wrong, fix=False)
    assert (found[-1].what, found[-1].ok) == ("namespace", False)
    assert "TEMPORAL_NAMESPACE" in found[-1].to_do


async def test_two_namespaces_that_share_a_store_leave_each_other_alone(
    temporal: WorkflowEnvironment, lite: Stage
) -> None:
    """The same task queue, store and agent; the runs of one namespace are nothing to the other's workers and sweep."""
    world, other = World(), Stage(await namespace(temporal.client), lite.runtime, lite.model, lite.queue)
    spec = agent(world.tool("book"), world.tool("send", approval=True))
    lite.model.script = sequence(call(("book", {})), call(("send", {})), say("done"))
    async with lite.worker(), other.worker():
        here, there = await lite.start(spec), await other.start(spec)
        for each in (here, there):
            await until(each, lambda s: bool(s.approvals))
            await each.terminate("by hand")
    for stage, run in ((lite, here), (other, there)):
        found = await find_orphans(lite.runtime.db, stage.client, 0)
        assert [repair.workflow_id for repair in found] == [run.id]
    async with lite.worker():
        waiting = await other.start(spec)
        await until(await lite.start(spec), lambda s: bool(s.approvals))
        assert (await waiting.describe()).history_length == 2, "a worker of another namespace took its task"
        await waiting.terminate()


async def test_a_worker_takes_as_much_as_its_machine_allows(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"), world.tool("order"))
    lite.model.script = sequence(call(("book", {}), ("order", {})), say("done"))
    chosen = lite.runtime.settings.model_copy(update={"slots": "resource", "slots_cpu": 1.0, "slots_memory": 1.0})
    runtime = replace(lite.runtime, settings=chosen)
    async with make_worker(lite.client, lite.queue, runtime) as worker:
        assert worker.config()["tuner"] is not None
        assert (await (await lite.start(spec)).result()).outcome is RunOutcome.COMPLETED
    assert slots(lite.runtime.settings) == {"max_concurrent_activities": 200}


async def namespace(client: Client, searchable: bool = True) -> Client:
    """A new namespace of the server, once it is there."""
    name = f"n-{uuid.uuid4().hex[:8]}"
    retention = Duration()
    retention.FromTimedelta(timedelta(days=1))
    await client.workflow_service.register_namespace(
        RegisterNamespaceRequest(namespace=name, workflow_execution_retention_period=retention)
    )
    there = await Client.connect(
        client.service_client.config.target_host, namespace=name, data_converter=DATA_CONVERTER
    )
    await there.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=name))
    if searchable:
        kinds = dict.fromkeys((key.name for key in SEARCH_ATTRIBUTES), IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD)
        await there.operator_service.add_search_attributes(
            AddSearchAttributesRequest(namespace=name, search_attributes=kinds)
        )
    return there
