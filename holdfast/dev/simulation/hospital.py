"""A simulated hospital: five services behind one port, in one process.

    python -m holdfast.dev.simulation.hospital --port 8090 --db hospital.db

The hospital records every request and effect in its own SQLite file, with the `Idempotency-Key` of the request, so that
tests can count what happened without relying on the platform's records.

    records        GET  /records/patients/{id}, /records/patients/{id}/orders
    insurance      POST or GET /insurance/verify                       read-only
    pharmacy       POST, GET ?key=, DELETE ?key=  /pharmacy/orders     honours keys
    appointments   POST, GET ?key=, DELETE ?key=  /appointments        honours keys
    messages       POST, GET ?reference=          /messages            ignores keys: two POSTs send twice; a message
                                                                       not sent within 20 s is never sent

All patients are fictitious.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from holdfast.contracts.data import Json, digest
from holdfast.dev.simulation.serve import Database, arguments, read_rows, serve
from holdfast.dev.simulation.service_faults import FaultBoard, error_body, refusal, under
from holdfast.reliability.sent_keys import inside, outside

SERVICES = ("records", "insurance", "pharmacy", "appointments", "messages")
PATIENTS = Path(__file__).parent / "patients"
MESSAGES_SETTLE_S = 20.0
"""The service never sends a message older than this, even when it is slow; its clients rely on that."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, service TEXT NOT NULL, method TEXT NOT NULL, path TEXT NOT NULL,
    key TEXT NOT NULL, status INTEGER);
CREATE TABLE IF NOT EXISTS effects (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, service TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL,
    detail TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS effects_by_key ON effects (service, key);
CREATE TABLE IF NOT EXISTS keyed (
    service TEXT NOT NULL, key TEXT NOT NULL, digest TEXT NOT NULL, status TEXT NOT NULL, answer TEXT NOT NULL,
    PRIMARY KEY (service, key));
"""


# ------------------------------------------------------------------ reading the hospital's own record


@dataclass(frozen=True)
class RequestRow:
    """A request as received. `status` is the answer's; None before the answer, and for good when the request hung."""

    id: int
    at: float
    service: str
    method: str
    path: str
    key: str
    status: int | None


@dataclass(frozen=True)
class EffectRow:
    """One effect. `kind`: order, cancel-order, book, cancel-booking, message, retraction.

    `key` is the effect's idempotency key; a cancellation has the key of the effect that it cancelled.
    """

    id: int
    at: float
    service: str
    kind: str
    key: str
    detail: Json


class HospitalRecord:
    """Reads a hospital's SQLite file, with the platform's form of keys. prefix: selects one run by its `key_base/`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def requests(self, prefix: str = "") -> list[RequestRow]:
        return [RequestRow(**row) for row in self._rows("requests", prefix)]

    def effects(self, prefix: str = "") -> list[EffectRow]:
        return [EffectRow(**row | {"detail": json.loads(row["detail"])}) for row in self._rows("effects", prefix)]

    def ledger(self, prefix: str = "") -> Json:
        """Counts per service (requests; answers by status, or "none"; effects by kind) and per key.

        {"services": {"pharmacy": {"requests": 2, "answers": {"503": 1, "201": 1}, "effects": {"order": 1}}, …},
         "keys": {"<key>": {"service": "pharmacy", "requests": 2, "effects": {"order": 1}}, …}}
        """
        services: dict[str, Json] = {name: {"requests": 0, "answers": {}, "effects": {}} for name in SERVICES}
        keys: dict[str, Json] = {}

        def by_key(row: RequestRow | EffectRow) -> Json:
            return keys.setdefault(row.key, {"service": row.service, "requests": 0, "effects": {}})

        for request in self.requests(prefix):
            of = services[request.service]
            of["requests"] += 1
            status = str(request.status or "none")
            of["answers"][status] = of["answers"].get(status, 0) + 1
            by_key(request)["requests"] += 1
        for effect in self.effects(prefix):
            for of in (services[effect.service], by_key(effect)):
                of["effects"][effect.kind] = of["effects"].get(effect.kind, 0) + 1
        return {"services": services, "keys": keys}

    def _rows(self, table: str, prefix: str) -> list[Json]:
        sql = f"SELECT * FROM {table} WHERE substr(key, 1, length(?)) = ? ORDER BY id"
        rows = read_rows(self._path, sql, (outside(prefix), outside(prefix)))
        return [row | {"key": inside(row["key"])} for row in rows]


# ------------------------------------------------------------------ the services


class Refused(Exception):
    """The service answers with this status and message; the request has no effect and leaves only its row."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Call:
    """A request, as the services handle it."""

    method: str
    path: Json
    query: Json
    body: Json
    key: str
    """The `Idempotency-Key` header, or the reference of a message."""


class Hospital:
    def __init__(self, db: Path, patients: Path = PATIENTS) -> None:
        self._db = Database(db, _SCHEMA)
        self._record = HospitalRecord(db)
        self._patients = patients
        self._faults = FaultBoard(SERVICES)
        self.app = Starlette(
            routes=[
                self._route("records", "/records/patients/{id}", self._patient, "GET"),
                self._route("records", "/records/patients/{id}/orders", self._orders, "GET"),
                self._route("insurance", "/insurance/verify", self._verify, "GET", "POST"),
                self._route("pharmacy", "/pharmacy/orders", self._pharmacy, "GET", "POST", "DELETE"),
                self._route("appointments", "/appointments", self._appointments, "GET", "POST", "DELETE"),
                self._route("messages", "/messages", self._messages, "GET", "POST"),
                Route("/ledger", self._ledger, methods=["GET"]),
                *self._faults.routes,
            ]
        )

    def _route(self, service: str, path: str, handle: Callable[[Call], tuple[int, Json]], *methods: str) -> Route:
        """One endpoint: records the request, applies the fault, works in one transaction, records the status."""

        async def endpoint(request: Request) -> Response:
            raw = await request.body()
            body = _object(raw)
            query = dict(request.query_params)
            key = (
                request.headers.get("Idempotency-Key") or (body or {}).get("reference") or query.get("reference") or ""
            )
            came = time.monotonic()
            row = self._db.write(
                "INSERT INTO requests (at, service, method, path, key) VALUES (?, ?, ?, ?, ?)",
                (time.time(), service, request.method, request.url.path, str(key)),
            )

            async def work() -> Response:
                if body is None:
                    return refusal(400, "the body is not a JSON object")
                if service == "messages" and request.method == "POST" and time.monotonic() - came > MESSAGES_SETTLE_S:
                    return refusal(503, f"given up: the message could not be sent within {MESSAGES_SETTLE_S:.0f} s")
                try:
                    with self._db:
                        status, answer = handle(Call(request.method, request.path_params, query, body, str(key)))
                except Refused as refused:
                    return refusal(refused.status, str(refused))
                return JSONResponse(answer, status)

            fault = self._faults.take(service, request.method)
            response = await under(fault, work)
            if fault is None or fault.mode in ("fail", "slow"):
                self._db.write("UPDATE requests SET status = ? WHERE id = ?", (response.status_code, row))
            return response

        return Route(path, endpoint, methods=list(methods))

    async def _ledger(self, request: Request) -> Response:
        return JSONResponse(self._record.ledger(request.query_params.get("prefix", "")))

    # ---- records and insurance

    def _resources(self, patient_id: Any) -> list[Json]:
        """All FHIR resources of a patient."""
        path = self._patients / f"{patient_id}.json"
        if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", str(patient_id)) or not path.is_file():
            raise Refused(404, f"no patient {patient_id!r}")
        return [entry["resource"] for entry in json.loads(path.read_text())["entry"]]

    def _patient(self, call: Call) -> tuple[int, Json]:
        return 200, self._bundle(call, {"Patient", "Encounter", "Condition"})

    def _orders(self, call: Call) -> tuple[int, Json]:
        return 200, self._bundle(call, {"MedicationRequest", "ServiceRequest"})

    def _bundle(self, call: Call, types: set[str]) -> Json:
        found = [each for each in self._resources(call.path["id"]) if each["resourceType"] in types]
        return {"resourceType": "Bundle", "type": "searchset", "entry": [{"resource": each} for each in found]}

    def _verify(self, call: Call) -> tuple[int, Json]:
        patient_id = call.body.get("patient_id") or call.query.get("patient_id")
        for each in self._resources(patient_id):
            if each["resourceType"] == "Coverage":
                payor = each["payor"][0]["display"]
                return 200, {"coverage": each["status"], "payor": payor, "subscriber": each["subscriberId"]}
        return 200, {"coverage": "none", "detail": "no coverage on file"}

    # ---- pharmacy and appointments: honour keys

    def _pharmacy(self, call: Call) -> tuple[int, Json]:
        return self._keyed("pharmacy", "order", "cancel-order", call, needs=("patient_id", "items"))

    def _appointments(self, call: Call) -> tuple[int, Json]:
        return self._keyed("appointments", "book", "cancel-booking", call, needs=("patient_id", "reason"))

    def _keyed(self, service: str, kind: str, undo: str, call: Call, needs: tuple[str, ...]) -> tuple[int, Json]:
        """Creates, reads or cancels by key. A key never has two effects, and none after it was cancelled."""
        key = call.key if call.method == "POST" else call.query.get("key", "")
        if not key:
            raise Refused(400, "needs an Idempotency-Key header" if call.method == "POST" else "needs ?key=")
        known = self._db.rows("SELECT digest, status, answer FROM keyed WHERE service = ? AND key = ?", (service, key))
        first, status, answer = known[0] if known else ("", "unknown", "{}")
        if call.method == "POST":
            if status in ("cancelled", "barred"):
                raise Refused(410, f"key {key!r} was cancelled")
            if status == "placed" and first != digest(call.body):
                raise Refused(409, f"key {key!r} was used for another request")
            if status == "unknown":
                self._check(call, needs)
                answer = json.dumps({"id": f"{kind}-{digest([service, key])}", **call.body})
                self._remember(service, key, digest(call.body), "placed", answer)
                self._effect(service, kind, key, call.body)
            return 201, json.loads(answer) | {"status": "placed"}
        if status in ("unknown", "barred"):
            if call.method == "DELETE":
                # A frozen worker may still send this order later: refuse its key from now on.
                self._remember(service, key, "", "barred", "{}")
            return 404, error_body(f"nothing was placed under key {key!r}")
        if call.method == "DELETE" and status == "placed":
            status = "cancelled"
            self._remember(service, key, first, status, answer)
            self._effect(service, undo, key, {"by": call.key})
        return 200, json.loads(answer) | {"status": status}

    def _remember(self, service: str, key: str, of: str, status: str, answer: str) -> None:
        self._db.write(
            "INSERT OR REPLACE INTO keyed (service, key, digest, status, answer) VALUES (?, ?, ?, ?, ?)",
            (service, key, of, status, answer),
        )

    # ---- messages: ignore keys

    def _messages(self, call: Call) -> tuple[int, Json]:
        if call.method == "POST":
            self._check(call, ("reference", "to", "text"))
            kind = "retraction" if call.body.get("retracts") else "message"
            number = self._effect("messages", kind, str(call.body["reference"]), call.body)
            return 202, {"id": f"message-{number}", "status": "sent", **call.body}
        sent = self._db.rows(
            "SELECT id, detail FROM effects WHERE service = 'messages' AND key = ? ORDER BY id",
            (call.query.get("reference", ""),),
        )
        found = [{"id": f"message-{number}", "status": "sent", **json.loads(detail)} for number, detail in sent]
        return 200, {"messages": found}

    def _check(self, call: Call, needs: tuple[str, ...]) -> None:
        if missing := [name for name in needs if not call.body.get(name)]:
            raise Refused(400, f"missing: {', '.join(missing)}")
        if "patient_id" in needs:
            self._resources(call.body["patient_id"])

    def _effect(self, service: str, kind: str, key: str, detail: Json) -> int:
        return self._db.write(
            "INSERT INTO effects (at, service, kind, key, detail) VALUES (?, ?, ?, ?, ?)",
            (time.time(), service, kind, key, json.dumps(detail)),
        )


def _object(raw: bytes) -> Json | None:
    """The body as a JSON object; {} for an empty body; None for anything else."""
    try:
        value = json.loads(raw or b"{}")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def main() -> None:
    parser = arguments("A simulated hospital with records, insurance, pharmacy, appointments and messages.")
    parser.add_argument("--patients", type=Path, default=PATIENTS, help="a folder of FHIR bundles, one file a patient")
    options = parser.parse_args()
    serve(Hospital(options.db, options.patients).app, options, "hospital")


if __name__ == "__main__":
    main()
