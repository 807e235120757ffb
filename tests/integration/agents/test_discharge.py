"""The discharge agent's tools against the real simulated hospital and the scripted model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr, ValidationError

from holdfast.authoring.options import AS_SET, ModelAnswer, ModelOptions
from holdfast.authoring.registry import agent
from holdfast.authoring.tools import ToolContext, Undo
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ToolRefused
from holdfast.contracts.profile import Effect
from holdfast.dev.simulation.hospital import HospitalRecord
from holdfast.dev.simulation.script import decide
from holdfast.reasoning.conversation import inbox_messages, parse
from holdfast.reasoning.model_client import ModelClient
from holdfast.settings import Settings
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.services import Running, service

SPEC = agent("discharge")
ORDER: Json = {"patient_id": "pat-1", "items": [{"name": "Amoxicillin", "dosage": ""}]}
VISIT: Json = {"patient_id": "pat-1", "reason": "check-up", "not_before": "2026-12-01", "not_after": None}
PROVIDERS: Json = {"patient_id": "pat-1", "recipients": ["dr.lee", "Dr. Mira Invented"], "text": "discharged"}
FACTS: Json = {
    "patient_id": "pat-1",
    "name": "Ada Example",
    "stay": "pneumonia",
    "diagnoses": ["pneumonia", "hypertension"],
    "medications": [],
    "follow_up": "",
    "open_points": ["pending pharmacist"],
}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with service("hospital", tmp_path_factory.mktemp("hospital") / "hospital.db") as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with service("scripted_model", tmp_path_factory.mktemp("model") / "model.db") as running:
        yield running


@pytest.fixture
async def ctx(request: pytest.FixtureRequest, hospital: Running, model: Running) -> AsyncIterator[ToolContext]:
    settings = Settings(openai_base_url=f"{model.url}/v1", openai_api_key=SecretStr("x"), model="scripted-1")
    models = ModelClient(settings)
    key = f"{request.node.name}/run/1"

    async def ask_model(label: str, messages: list[Json], options: ModelOptions | None = None, /) -> ModelAnswer:
        return await models.complete(messages, [], key=f"{key}/{label}", options=options or AS_SET)

    async with httpx2.AsyncClient(timeout=PATIENCE_S) as http:
        yield ToolContext(key, 1, http, {"hospital": hospital.url}.__getitem__, ask_model)
        await http.delete(f"{hospital.url}/faults")
        await http.delete(f"{model.url}/faults")
    await models.close()


@pytest.fixture
def kinds(hospital: Running, ctx: ToolContext) -> Any:
    """The kinds of effect that this test has had."""
    return lambda: [effect.kind for effect in HospitalRecord(hospital.db).effects(ctx.key)]


async def call(ctx: ToolContext, name: str, arguments: Json) -> Any:
    tool = SPEC.by_name[name]
    return await tool.call(ctx, tool.validate(arguments))


async def undo(ctx: ToolContext, name: str, arguments: Json) -> str | None:
    """The undo as after an unknown outcome: without the result, under a key of its own."""
    after = replace(ctx, key=f"{ctx.key}/undo")
    return await SPEC.by_name[name].run_undo(after, Undo(ctx.key, arguments, None))


def test_the_declaration_says_what_a_crash_in_the_middle_means():
    assert {tool.name: tool.effect for tool in SPEC.tools} == {
        "read_record": Effect.READ,
        "read_orders": Effect.READ,
        "verify_insurance": Effect.READ,
        "order_medication": Effect.IDEMPOTENT,
        "book_appointment": Effect.IDEMPOTENT,
        "write_summary": Effect.READ,
        "notify_patient": Effect.MANUAL,
        "notify_providers": Effect.PROBE,
    }
    assert {tool.name for tool in SPEC.tools if tool.approval} == {"notify_patient", "notify_providers"}
    undone = {tool.name for tool in SPEC.tools if tool.undo_function}
    assert undone == {"order_medication", "book_appointment", "notify_providers"}
    pharmacy = SPEC.by_name["order_medication"]
    assert (pharmacy.timeout_s, pharmacy.retries, SPEC.by_name["verify_insurance"].retries) == (10, 0, 5)


def test_the_steps_cover_all_tools_and_name_who_settles_the_optional_ones():
    assert [step.name for step in SPEC.steps] == [
        "record", "insurance", "pharmacy", "appointments", "summary", "notify",
    ]  # fmt: skip
    assert sorted(tool for step in SPEC.steps for tool in step.tools) == sorted(SPEC.by_name)
    assert {step.name: step.role for step in SPEC.steps if not step.critical} == {
        "insurance": "billing",
        "pharmacy": "pharmacist",
        "appointments": "scheduling desk",
    }


@pytest.mark.parametrize(
    "bad", [{}, {"patient_id": "../etc"}, {"patient_id": ""}, {"patient_id": "p", "phisician": "x"}]
)
def test_a_run_is_not_started_with_a_bad_input(bad):
    with pytest.raises(ValidationError):
        SPEC.messages(bad)


@pytest.mark.parametrize(
    ("tool", "bad"),
    [
        ("read_record", {"patient_id": "pat-1/orders"}),
        ("order_medication", ORDER | {"items": []}),
        ("book_appointment", VISIT | {"not_before": "soon"}),
        ("notify_patient", {"patient_id": "pat-1", "channel": "pigeon", "to": "x", "text": "y"}),
        ("notify_providers", PROVIDERS | {"recipients": []}),
        ("notify_providers", PROVIDERS | {"cc": "x"}),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tool, bad):
    with pytest.raises(ValidationError):
        SPEC.by_name[tool].validate(bad)


async def test_reading_and_insurance_carry_the_key_and_have_no_effect(ctx, hospital, kinds):
    record = await call(ctx, "read_record", {"patient_id": "pat-1"})
    assert record["entry"][0]["resource"]["id"] == "pat-1"
    assert (await call(ctx, "read_orders", {"patient_id": "pat-1"}))["entry"]
    assert (await call(ctx, "verify_insurance", {"patient_id": "pat-1"}))["coverage"] == "active"
    assert len(HospitalRecord(hospital.db).requests(ctx.key)) == 3
    assert kinds() == []


@pytest.mark.parametrize("tool", ["read_record", "read_orders", "verify_insurance"])
async def test_an_unknown_patient_is_told_to_the_model(ctx, tool):
    with pytest.raises(ToolRefused, match="no patient 'pat-9'"):
        await call(ctx, tool, {"patient_id": "pat-9"})


async def test_an_error_of_the_service_reaches_the_platform_as_it_is(ctx, hospital):
    await ctx.http.put(f"{hospital.url}/faults/pharmacy", json={"mode": "fail", "status": 503})
    with pytest.raises(httpx2.HTTPStatusError, match="503"):
        await call(ctx, "order_medication", ORDER)


@pytest.mark.parametrize(
    ("tool", "arguments", "effects"),
    [("order_medication", ORDER, ["order", "cancel-order"]), ("book_appointment", VISIT, ["book", "cancel-booking"])],
)
class TestOrderAndVisit:
    async def test_repeated_it_is_one_effect_and_undone_it_is_one_cancellation(
        self, ctx, kinds, tool, arguments, effects
    ):
        assert await call(ctx, tool, arguments) == await call(ctx, tool, arguments)
        for _ in range(2):
            assert "cancelled" in (await undo(ctx, tool, arguments) or "")
        assert kinds() == effects

    async def test_the_undo_of_what_never_arrived_says_so_and_bars_a_late_arrival(
        self, ctx, kinds, tool, arguments, effects
    ):
        assert await undo(ctx, tool, arguments) is None
        with pytest.raises(httpx2.HTTPStatusError, match="410"):
            await call(ctx, tool, arguments)
        assert kinds() == []

    async def test_an_answer_that_was_lost_is_undone_all_the_same(self, ctx, hospital, kinds, tool, arguments, effects):
        for each in ("pharmacy", "appointments"):
            await ctx.http.put(f"{hospital.url}/faults/{each}", json={"mode": "drop", "times": 1})
        with pytest.raises(httpx2.TransportError):
            await call(ctx, tool, arguments)
        await ctx.http.delete(f"{hospital.url}/faults")
        assert "cancelled" in (await undo(ctx, tool, arguments) or "")
        assert kinds() == effects


async def test_the_probe_tells_whether_the_providers_were_notified(ctx, hospital, kinds):
    tool = SPEC.by_name["notify_providers"]
    assert await tool.run_probe(ctx, PROVIDERS) is None
    await ctx.http.put(f"{hospital.url}/faults/messages", json={"mode": "drop", "times": 1})
    with pytest.raises(httpx2.TransportError):
        await call(ctx, "notify_providers", PROVIDERS)
    found = await tool.run_probe(ctx, PROVIDERS)
    assert found is not None
    assert (found["to"], found["text"], found["status"]) == (PROVIDERS["recipients"], "discharged", "sent")
    assert kinds() == ["message"]


async def test_what_was_sent_is_retracted_once(ctx, kinds, hospital):
    await call(ctx, "notify_providers", PROVIDERS)
    for _ in range(2):
        assert "dr.lee" in (await undo(ctx, "notify_providers", PROVIDERS) or "")
    assert kinds() == ["message", "retraction"]
    retraction = HospitalRecord(hospital.db).effects(ctx.key)[-1].detail
    assert (retraction["retracts"], retraction["to"]) == (ctx.key, PROVIDERS["recipients"])


async def test_what_was_never_sent_is_not_retracted(ctx, kinds):
    assert await undo(ctx, "notify_providers", PROVIDERS) is None
    assert kinds() == []


async def test_the_patient_gets_the_message_on_the_channel(ctx, kinds, hospital):
    message = {"patient_id": "pat-3", "channel": "letter", "to": "3 Nowhere Lane", "text": "hello"}
    assert (await call(ctx, "notify_patient", message))["status"] == "sent"
    detail = HospitalRecord(hospital.db).effects(ctx.key)[0].detail
    assert (detail["channel"], detail["to"], detail["reference"]) == ("letter", ["3 Nowhere Lane"], ctx.key)


async def test_the_summary_says_that_a_model_wrote_it(ctx):
    summary = await call(ctx, "write_summary", FACTS)
    assert summary["written_by"] == "model scripted-1"
    assert "Ada Example" in summary["text"]


async def test_the_template_writes_the_summary_from_the_facts_alone_and_says_so(ctx):
    summary = await SPEC.by_name["write_summary"].run_template(ctx, FACTS)
    assert summary["written_by"] == "template"
    assert "Diagnoses: pneumonia; hypertension\nMedication: none\nFollow-up: none" in summary["text"]
    assert "pending pharmacist" in summary["text"]


@pytest.mark.parametrize("patient", ["pat-1", "pat-2", "pat-3"])
async def test_the_scripted_model_and_the_tools_finish_a_discharge_together(ctx, kinds, patient):
    """Everything but the platform: real answers, each call validated as the platform does it, one effect each."""
    messages = SPEC.messages({"patient_id": patient})
    seq = 0
    decision = None
    for _ in range(8):
        messages.append(decide(messages, [each.openai for each in SPEC.tools]))
        decision, problems = parse(messages[-1], SPEC)
        assert decision is not None, problems
        answers = []
        for each in decision.calls:
            seq += 1
            answers.append(json.dumps(await call(replace(ctx, key=f"{ctx.key}/{seq}"), each.tool, each.arguments)))
        messages += inbox_messages(messages, answers, [])
        if decision.final:
            break
    assert decision is not None
    assert decision.final is not None
    assert seq == 8
    assert kinds() == ["order", "book", "message", "message"]
    assert ("no coverage on file" in decision.final) == (patient == "pat-3")
