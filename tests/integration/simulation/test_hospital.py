"""The hospital over real HTTP, in its own process: what it honours, what it ignores, how it fails, what it records."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest

from holdfast.dev.simulation.hospital import HospitalRecord
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.services import Running, service, until

ORDER = {"patient_id": "pat-1", "items": [{"medication": "Amoxicillin", "dosage": "3 a day"}]}
VISIT = {"patient_id": "pat-1", "reason": "follow-up", "within_days": 14}
MESSAGE = {"to": ["+1-555-0101"], "text": "hello"}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with service("hospital", tmp_path_factory.mktemp("hospital") / "hospital.db") as running:
        yield running


@pytest.fixture
async def http(hospital: Running) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=hospital.url, timeout=10) as client:
        yield client
        await client.delete("/faults")


@pytest.fixture
def record(hospital: Running) -> HospitalRecord:
    return HospitalRecord(hospital.db)


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key of this test, with all that a workflow id may hold."""
    return f"wf {request.node.name}/run-1?#%/3"


def kinds(record: HospitalRecord, key: str) -> list[str]:
    return [effect.kind for effect in record.effects() if effect.key == key]


@pytest.mark.parametrize(
    ("path", "body", "kind", "undo"),
    [("/pharmacy/orders", ORDER, "order", "cancel-order"), ("/appointments", VISIT, "book", "cancel-booking")],
)
class TestServicesThatHonourKeys:
    async def test_same_key_is_one_effect_and_the_same_answer(self, http, record, key, path, body, kind, undo):
        answers = await asyncio.gather(
            *(http.post(path, json=body, headers={"Idempotency-Key": key}) for _ in range(5)),
        )
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.text for answer in answers}) == 1
        assert kinds(record, key) == [kind]
        assert sum(1 for request in record.requests() if request.key == key) == 5
        assert (await http.get(path, params={"key": key})).json()["status"] == "placed"

    async def test_same_key_with_another_body_is_a_conflict(self, http, record, key, path, body, kind, undo):
        await http.post(path, json=body, headers={"Idempotency-Key": key})
        other = await http.post(path, json=body | {"note": "more"}, headers={"Idempotency-Key": key})
        assert other.status_code == 409
        assert kinds(record, key) == [kind]

    async def test_cancel_is_one_effect_however_often(self, http, record, key, path, body, kind, undo):
        await http.post(path, json=body, headers={"Idempotency-Key": key})
        for _ in range(2):
            cancelled = await http.delete(path, params={"key": key}, headers={"Idempotency-Key": f"{key}/undo"})
            assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
        assert kinds(record, key) == [kind, undo]
        again = await http.post(path, json=body, headers={"Idempotency-Key": key})
        assert again.status_code == 410
        assert kinds(record, key) == [kind, undo]

    async def test_cancel_of_what_never_came_bars_its_key(self, http, record, key, path, body, kind, undo):
        """A frozen worker that wakes after the undo must not order any more."""
        for _ in range(2):
            cancelled = await http.delete(path, params={"key": key})
            assert cancelled.status_code == 404
            assert "nothing was placed" in cancelled.json()["error"]["message"]
        late = await http.post(path, json=body, headers={"Idempotency-Key": key})
        assert late.status_code == 410
        assert kinds(record, key) == []
        assert (await http.get(path, params={"key": key})).status_code == 404

    async def test_an_order_without_a_key_or_a_patient_is_refused(self, http, record, key, path, body, kind, undo):
        before = len(record.effects())
        assert (await http.post(path, json=body)).status_code == 400
        headers = {"Idempotency-Key": key}
        assert (await http.post(path, json={}, headers=headers)).status_code == 400
        assert (await http.post(path, content=b"{", headers=headers)).status_code == 400
        assert (await http.post(path, json=body | {"patient_id": "pat-9"}, headers=headers)).status_code == 404
        assert len(record.effects()) == before

    async def test_drop_comes_after_the_effect(self, http, record, key, path, body, kind, undo):
        await http.put(f"/faults/{path.split('/')[1]}", json={"mode": "drop", "times": 1})
        with pytest.raises(httpx2.TransportError):
            await http.post(path, json=body, headers={"Idempotency-Key": key})
        assert kinds(record, key) == [kind]
        assert [request.status for request in record.requests() if request.key == key] == [None]
        repeat = await http.post(path, json=body, headers={"Idempotency-Key": key})
        assert repeat.status_code == 201
        assert kinds(record, key) == [kind]


async def test_messages_ignore_keys_and_can_be_asked_by_reference(http, record, key):
    body = MESSAGE | {"reference": key}
    assert (await http.get("/messages", params={"reference": key})).json() == {"messages": []}
    for _ in range(2):
        assert (await http.post("/messages", json=body, headers={"Idempotency-Key": key})).status_code == 202
    assert kinds(record, key) == ["message", "message"]
    sent = (await http.get("/messages", params={"reference": key})).json()["messages"]
    assert [each["text"] for each in sent] == ["hello", "hello"]
    await http.post("/messages", json=MESSAGE | {"reference": f"{key}/undo", "retracts": key})
    assert kinds(record, f"{key}/undo") == ["retraction"]


async def test_insurance_only_reads(http, record):
    before = len(record.effects())
    by_post = await http.post("/insurance/verify", json={"patient_id": "pat-1"})
    by_get = await http.get("/insurance/verify", params={"patient_id": "pat-1"})
    assert by_post.json() == by_get.json()
    assert by_post.json()["coverage"] == "active"
    assert (await http.post("/insurance/verify", json={"patient_id": "pat-3"})).json() == {
        "coverage": "none",
        "detail": "no coverage on file",
    }
    assert len(record.effects()) == before


@pytest.mark.parametrize("patient", ["pat-1", "pat-2", "pat-3"])
async def test_records_are_fhir_bundles_of_that_patient(http, patient):
    record = (await http.get(f"/records/patients/{patient}")).json()
    orders = (await http.get(f"/records/patients/{patient}/orders")).json()
    resources = [entry["resource"] for entry in record["entry"] + orders["entry"]]
    assert {each["resourceType"] for each in resources} == {
        "Patient", "Encounter", "Condition", "MedicationRequest", "ServiceRequest",
    }  # fmt: skip
    for each in resources:
        if each["resourceType"] == "Patient":
            assert each["id"] == patient
            assert ("telecom" in each) == (patient != "pat-3")
        else:
            assert each["subject"] == {"reference": f"Patient/{patient}"}


@pytest.mark.parametrize("patient", ["pat-9", "..%2f..%2fpyproject", "pat-1.json"])
async def test_an_unknown_patient_is_a_404(http, patient):
    assert (await http.get(f"/records/patients/{patient}")).status_code == 404


async def test_fail_answers_before_any_effect_for_so_many_requests(http, record, key):
    await http.put("/faults/pharmacy", json={"mode": "fail", "times": 2, "status": 503, "retry_after": 1.5})
    answers = [await http.post("/pharmacy/orders", json=ORDER, headers={"Idempotency-Key": key}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503, 503, 201]
    assert [answer.headers.get("Retry-After") for answer in answers] == ["1.5", "1.5", None]
    assert kinds(record, key) == ["order"]
    assert [request.status for request in record.requests() if request.key == key] == [503, 503, 201]


async def test_a_fault_without_times_stays_until_taken_back_and_may_be_for_one_method(http, key):
    await http.put("/faults/pharmacy", json={"mode": "fail", "method": "POST"})
    headers = {"Idempotency-Key": key}
    for _ in range(3):
        assert (await http.post("/pharmacy/orders", json=ORDER, headers=headers)).status_code == 503
    assert (await http.get("/pharmacy/orders", params={"key": key})).status_code == 404
    assert "pharmacy" in (await http.get("/faults")).json()
    await http.delete("/faults")
    assert (await http.post("/pharmacy/orders", json=ORDER, headers=headers)).status_code == 201


async def test_hang_never_answers_has_no_effect_and_holds_up_nobody(http, record, key):
    await http.put("/faults/pharmacy", json={"mode": "hang", "times": 1})
    hanging = asyncio.create_task(http.post("/pharmacy/orders", json=ORDER, headers={"Idempotency-Key": key}))
    await until(lambda: any(request.key == key for request in record.requests()))
    others = await asyncio.gather(*(http.get("/records/patients/pat-1") for _ in range(10)))
    assert all(other.status_code == 200 for other in others)
    assert not hanging.done()
    hanging.cancel()
    assert kinds(record, key) == []


async def test_slow_does_the_effect_although_the_client_gave_up(http, record, key):
    await http.put("/faults/pharmacy", json={"mode": "slow", "seconds": 0.4, "times": 1})
    with pytest.raises(httpx2.TimeoutException):
        await http.post("/pharmacy/orders", json=ORDER, headers={"Idempotency-Key": key}, timeout=0.1)
    assert kinds(record, key) == []
    await until(lambda: kinds(record, key))
    assert kinds(record, key) == ["order"]


async def test_a_wrong_fault_is_refused_with_what_is_wrong(http):
    wrong = await http.put("/faults/pharmacy", json={"mode": "explode"})
    assert wrong.status_code == 400
    assert "mode" in wrong.json()["error"]["message"]
    unknown = await http.put("/faults/kitchen", json={"mode": "fail"})
    assert unknown.status_code == 404
    assert "pharmacy" in unknown.json()["error"]["message"]


async def test_the_ledger_counts_one_run(http, key):
    base = f"{key}-base"
    await http.put("/faults/pharmacy", json={"mode": "fail", "times": 1})
    for _ in range(2):
        await http.post("/pharmacy/orders", json=ORDER, headers={"Idempotency-Key": f"{base}/1"})
    await http.delete("/pharmacy/orders", params={"key": f"{base}/1"}, headers={"Idempotency-Key": f"{base}/1/undo"})
    ledger = (await http.get("/ledger", params={"prefix": f"{base}/"})).json()
    assert ledger["services"]["pharmacy"] == {
        "requests": 3,
        "answers": {"503": 1, "201": 1, "200": 1},
        "effects": {"order": 1, "cancel-order": 1},
    }
    assert ledger["services"]["messages"] == {"requests": 0, "answers": {}, "effects": {}}
    assert ledger["keys"][f"{base}/1"] == {
        "service": "pharmacy",
        "requests": 2,
        "effects": {"order": 1, "cancel-order": 1},
    }


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_while_a_request_hangs_and_a_restart_knows_the_keys(tmp_path, sign):
    db = tmp_path / "hospital.db"
    headers = {"Idempotency-Key": "k"}
    with service("hospital", db) as running:
        async with httpx2.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
            await client.post("/pharmacy/orders", json=ORDER, headers=headers)
            await client.put("/faults/records", json={"mode": "hang"})
            hanging = asyncio.create_task(client.get("/records/patients/pat-1"))
            await until(lambda: len(HospitalRecord(db).requests()) == 2)
            running.process.send_signal(sign)
            assert await asyncio.to_thread(running.process.wait, PATIENCE_S) == 0
            with pytest.raises(httpx2.TransportError):
                await hanging
    with service("hospital", db) as running:
        async with httpx2.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
            assert (await client.post("/pharmacy/orders", json=ORDER, headers=headers)).status_code == 201
    assert kinds(HospitalRecord(db), "k") == ["order"]


def test_a_port_that_is_taken_is_one_clear_line(tmp_path: Path):
    with service("hospital", tmp_path / "a.db") as running:
        port = running.url.rpartition(":")[2]
        command = [
            sys.executable,
            "-m",
            "holdfast.dev.simulation.hospital",
            "--port",
            port,
            "--db",
            str(tmp_path / "b.db"),
        ]
        second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert port in second.stderr
