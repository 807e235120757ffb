"""Every way in which a discharge can go wrong, provoked in the simulated hospital on the real stack, and what people
see of it: status line, Web UI page, result, the operator's commands, and the hospital's own record.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from temporalio.client import WorkflowFailureError

from agents.discharge.prompts import SUMMARY_INSTRUCTIONS
from holdfast.authoring import registry
from holdfast.authoring.services import BreakerRule, Service
from holdfast.contracts.data import Json
from holdfast.contracts.people import Verdict
from holdfast.contracts.run import Phase, RunOutcome
from holdfast.dev.simulation.script import decide
from holdfast.dev.simulation.scripted_model import ModelRecord
from holdfast.testing.model import FakeModel, error
from tests.fixtures.services import service
from tests.fixtures.ward import PATIENCE_S, Ward, put_fault

SOON = BreakerRule(probe_after_s=6.0)
"""A breaker as every other one, but for the wait of half a minute. It is longer than the pauses before a call's fourth
and fifth try (2 s and 4 s, 20 % more at most), or these would be the probes.
"""


# ------------------------------------------------------------------ request keys that are no ASCII


@pytest.mark.parametrize("name", ["Müller", "日本", "100%C3%A9"])
async def test_a_request_key_in_any_script_finds_its_effects_and_undoes_them(ward: Ward, name: str) -> None:
    run = await ward.admit(key=f"{name}-{uuid4().hex[:8]}")
    await run.approve()
    result = await run.ended()
    assert result.outcome is RunOutcome.COMPLETED
    assert [kind for kind, _ in run.effects("pharmacy")] == ["order"]
    assert [kind for kind, _ in run.effects("messages")] == ["message", "message"]
    asked = ModelRecord(ward.stack.home / "model.db").calls(f"{result.key_base}/")
    assert len(asked) == result.usage.calls

    broken = await ward.admit(key=f"{name}-{uuid4().hex[:8]}")
    await broken.until_messages_wait()
    await broken.handle.cancel()
    with pytest.raises(WorkflowFailureError):
        await broken.ended()
    assert [kind for kind, _ in broken.effects("pharmacy")] == ["order", "cancel-order"]


# ------------------------------------------------------------------ insurance: flaky


async def test_an_insurance_that_fails_twice_is_verified_in_the_end(ward: Ward) -> None:
    await ward.fault("insurance", mode="fail", times=2)
    run = await ward.admit()
    await run.approve()
    result = await run.ended()
    assert (result.outcome, result.percent) == (RunOutcome.COMPLETED, 100)
    assert run.requests("insurance") == [503, 503, 200]


async def test_an_insurance_that_never_answers_well_is_left_to_billing_after_six_calls(ward: Ward) -> None:
    await ward.fault("insurance", mode="fail")
    run = await ward.admit()
    status = await run.until_messages_wait()
    assert status.line.startswith(
        "Discharge in progress: 4/6 steps complete. Insurance verification pending billing review. ETA 15 minutes."
    )
    page = await run.page()
    assert re.search(
        r"… Insurance verification: pending \(POST http://127\.0\.0\.1:\d+/insurance/verify answered 503", page
    )
    assert "Insurance verification: question `o3`, for billing review" in page
    assert "pending billing" in str(next(a.arguments["text"] for a in status.approvals if a.id == "a8"))
    await run.approve()
    result = await run.ended()
    assert (result.outcome, result.percent) == (RunOutcome.PARTIAL, 83)
    assert [(each.step, each.role) for each in result.pending] == [("insurance", "billing")]
    assert run.requests("insurance") == [503] * 6
    assert len(run.effects("messages")) == 2


# ------------------------------------------------------------------ pharmacy: hangs


async def test_a_pharmacy_that_hangs_blocks_nothing_and_its_order_is_settled_or_replayed(ward: Ward) -> None:
    """Three patients at once, because each waits ten seconds: settled during the run, after its end, and replayed."""
    await ward.fault("pharmacy", mode="hang", method="POST")
    during, after, again = runs = [await ward.admit() for _ in range(3)]
    for run in runs:
        status = await run.until_messages_wait()
        line = (
            "Discharge in progress: 4/6 steps complete. Pharmacy coordination pending pharmacist review. ETA 5 minutes."
        )
        assert status.line.startswith(line)
        page = await run.page()
        assert f"**{line}" in page
        assert "… Pharmacy coordination: pending (no answer from pharmacy within 10 s; it may have happened)" in page
        assert "Pharmacy coordination: question `o4`, for pharmacist review" in page
        assert run.requests("pharmacy") == [None]

    asked = await ward.told("approvals", during.id, "--role", "pharmacist")
    assert [(each["approval"]["id"], each["approval"]["step"]) for each in asked] == [("o4", "pharmacy")]
    await ward.told("settle", during.id, "pharmacy", "--happened", "--by", "ph.kim", "--comment", "by phone")
    await during.until(lambda now: now.percent == 83)
    assert "✓ Pharmacy coordination: done (settled by ph.kim)" in await during.page()
    await during.approve()
    result = await during.ended()
    assert (result.outcome, result.pending) == (RunOutcome.COMPLETED, [])

    for run in (after, again):
        await run.approve()
        result = await run.ended()
        assert result.outcome is RunOutcome.PARTIAL
        assert result.reason == "83 % complete, awaiting Pharmacy coordination (pharmacist)"
        status = await run.status()
        assert status.line == "Discharge partial: 5/6 steps complete. Pharmacy coordination pending pharmacist review"

    await ward.told("settle", after.id, "pharmacy", "--happened", "--by", "ph.kim", "--comment", "by phone")
    result = await after.stored()
    assert (result.outcome, result.pending, result.percent) == (RunOutcome.COMPLETED, [], 100)
    shown = (await ward.told("status", after.id))["status"]
    assert (shown["outcome"], shown["percent"]) == ("completed", 100)

    await ward.well_again()
    await ward.told("dlq", "replay", await again.letter(), "--yes", "--by", "ph.kim")
    assert (await again.stored()).outcome is RunOutcome.COMPLETED

    assert [run.effects("pharmacy") for run in runs] == [[], [], [("order", "4")]]
    assert again.requests("pharmacy") == [None, 201]


# ------------------------------------------------------------------ appointments: breaker


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process's discharge agent knows these as services that are tried again soon."""
    spec = registry.agent("discharge")
    soon = (Service(name, breaker=SOON) for name in ("appointments", "records", "messages"))
    services = (*spec.services, *soon)
    monkeypatch.setitem(registry._added, "discharge", replace(spec, services=services))
    registry.services.cache_clear()
    yield
    monkeypatch.undo()
    registry.services.cache_clear()


@pytest.mark.usefixtures("impatient")
async def test_appointments_that_are_down_are_escalated_and_booked_once_later(
    ward: Ward,
) -> None:
    await ward.fault("appointments", mode="fail", method="POST")
    async with ward.worker() as (queue, _):
        run = await ward.admit(queue, tenant="clinic-b")
        status = await run.until(lambda now: any(each.id == "o5" for each in now.approvals))
        again = re.compile(r"… Follow-up appointments: pending \(appointments.*; tried again at (\S+) UTC\)")
        first = again.search(page := await run.page())
        assert first
        assert "Follow-up appointments: question `o5`, for scheduling desk review" in page
        question = next(each for each in status.approvals if each.id == "o5")
        assert (question.role, question.step) == ("scheduling desk", "appointments")

        status = await run.until_messages_wait()  # the rest goes on
        assert status.line.startswith(
            "Discharge in progress: 4/6 steps complete. "
            "Follow-up appointments pending scheduling desk review. ETA 10 minutes."
        )
        async with asyncio.timeout(PATIENCE_S):
            while (next_one := again.search(await run.page())) is None or next_one[1] == first[1]:
                await asyncio.sleep(0.1)
        # Not later: each probe that fails is one of the call's six tries.
        await ward.well_again()
        status = await run.until(lambda now: now.percent == 83)
        assert "o5" not in [each.id for each in status.approvals], "the question has answered itself"
        breakers = {each["target"]: each for each in await ward.told("breakers")}
        assert breakers["appointments@clinic-b"]["state"] == "closed"
        await run.approve()
        assert (await run.ended()).outcome is RunOutcome.COMPLETED
    assert run.effects("appointments") == [("book", "5")]
    at = [each.at for each in ward.record.requests(f"{run.id}/") if each.service == "appointments"]
    assert at[2] - at[0] < SOON.probe_after_s, "three calls open the breaker"
    gaps = [later - earlier for earlier, later in pairwise(at[2:])]
    assert gaps
    assert all(gap >= SOON.probe_after_s - 0.1 for gap in gaps), "then none leaves but the probes"


# ------------------------------------------------------------------ a service that is down before the run begins


@pytest.mark.usefixtures("impatient")
async def test_with_the_records_down_the_run_waits_and_asks_about_whole_messages(ward: Ward) -> None:
    tenant = f"t-{uuid4().hex[:8]}"
    target = f"records@{tenant}"
    await ward.told("breakers", "trip", target, "--why", "moving house")
    async with ward.worker() as (queue, _):
        run = await ward.admit(queue, tenant)
        status = await run.until(lambda now: now.phase is Phase.PARKED)
        assert f"Parked: {target} may not be called" in status.line
        assert (status.approvals, status.turn) == ([], 1)
        await ward.told("breakers", "reset", target)
        status = await run.until_messages_wait()
        texts = [str(each.arguments["text"]) for each in status.approvals if each.kind == "tool"]
        assert all("Ada Example" in text for text in texts)
        await run.approve()
        result = await run.ended()
    assert (result.outcome, result.percent) == (RunOutcome.COMPLETED, 100)


@pytest.mark.usefixtures("impatient")
async def test_with_the_messages_down_the_run_waits_and_sends_them_when_they_are_back(ward: Ward) -> None:
    tenant = f"t-{uuid4().hex[:8]}"
    target = f"messages@{tenant}"
    await ward.told("breakers", "trip", target, "--why", "moving house")
    async with ward.worker() as (queue, _):
        run = await ward.admit(queue, tenant)
        await run.approve()
        status = await run.until(lambda now: now.phase is Phase.PARKED)
        assert "Trying again: notify_patient at " in status.line
        assert (status.outcome, status.percent) == (None, 83)
        await ward.told("breakers", "reset", target)
        result = await run.ended()
    assert (result.outcome, result.percent) == (RunOutcome.COMPLETED, 100)
    assert len(run.effects("messages")) == 2


# ------------------------------------------------------------------ the model: gone, or refusing


async def test_without_a_model_the_template_writes_the_summary_and_the_run_waits(ward: Ward, tmp_path: Path) -> None:
    """It thinks for a moment, so that it can be taken away between its turn and the summary."""
    with service("scripted_model", tmp_path / "model.db", "--think", "0.5") as model:
        record = ModelRecord(model.db)
        async with ward.worker(openai_base_url=f"{model.url}/v1") as (queue, runtime):
            runtime.models[0].service = replace(runtime.models[0].service, breaker=SOON)
            run = await ward.admit(queue)
            async with asyncio.timeout(PATIENCE_S):
                while not any("/turn-3." in call.key for call in record.calls(f"{run.id}/")):
                    await asyncio.sleep(0.02)
            await asyncio.to_thread(put_fault, f"{model.url}/faults/model", {"mode": "fail"})

            status = await run.until(lambda now: now.phase is Phase.PARKED)
            assert "Discharge summary by template" in status.line
            assert "Parked: model scripted-1" in status.line
            assert (status.undone, status.outcome) == ([], None)
            assert "✓ Discharge summary: done (template)" in await run.page()

            await asyncio.to_thread(httpx2.delete, f"{model.url}/faults")
            await run.approve()
            result = await run.ended()
    assert (result.outcome, result.percent) == (RunOutcome.COMPLETED, 100)
    assert {step.name: step.origin for step in result.steps if step.origin} == {"summary": "template"}
    assert [kind for kind, _ in run.effects("messages")] == ["message"] * 2
    sent = ward.record.effects(f"{run.id}/")[-1].detail["text"]
    assert "Discharge summary: Ada Example" in sent, "the providers get the template's text"


async def test_a_model_that_refuses_by_content_policy_asks_a_person(ward: Ward) -> None:
    tools = [each.openai for each in registry.agent("discharge").tools]
    refusals = [error(400, "content_policy_violation")]

    def script(messages: list[Json]) -> Any:
        if messages[0]["content"] == SUMMARY_INSTRUCTIONS:
            return decide(messages, [])
        second = sum(each["role"] == "assistant" for each in messages) == 1
        return refusals.pop() if second and refusals else decide(messages, tools)

    async with FakeModel.serve() as model, ward.worker(openai_base_url=model.url) as (queue, _):
        model.script = script
        run = await ward.admit(queue)
        status = await run.until(lambda now: bool(now.approvals))
        assert [(each.id, each.kind) for each in status.approvals] == [("t2", "refusal")]
        assert status.line == "Discharge in progress: 1/6 steps complete. Waiting for a human: turn 2"
        assert "### Waiting for a human: the model refuses (`t2`)" in await run.page()
        assert len([key for key, _ in model.requests if "/turn-2." in key]) == 1, "it is not asked on its own"
        await run.decide("t2", Verdict.APPROVE)
        await run.approve()
        assert (await run.ended()).outcome is RunOutcome.COMPLETED


# ------------------------------------------------------------------ messages: unknown outcomes


async def test_messages_whose_answer_is_lost_are_asked_for_and_never_sent_twice(
    ward: Ward,
) -> None:
    await ward.fault("messages", mode="drop", method="POST")
    run = await ward.admit()
    await run.approve()
    status = await run.until(lambda now: now.phase is Phase.WAITING_HUMAN and "o7" in {a.id for a in now.approvals})
    (question,) = [each for each in status.approvals if each.id == "o7"]
    assert (question.kind, question.subject) == ("outcome", "notify_patient")
    assert status.line.startswith("Discharge in progress: 5/6 steps complete. Notifications pending.")
    page = await run.page()
    assert "Notifications: question `o7`" in page
    assert "it may have happened" in page

    # The providers' message can be asked for by key, so nobody had to.
    async with asyncio.timeout(PATIENCE_S):
        while run.requests("messages").count(200) != 1:
            await asyncio.sleep(0.05)
    await ward.told("settle", run.id, "o7", "--happened", "--by", "dr.lee", "--comment", "the patient has it")
    result = await run.ended()
    assert result.outcome is RunOutcome.COMPLETED
    assert run.effects("messages") == [("message", "7"), ("message", "8")]
    assert sorted(run.requests("messages"), key=str) == [200, None, None]


# ------------------------------------------------------------------ a crash


async def test_a_worker_killed_at_step_five_repeats_none_of_the_four_before(ward: Ward) -> None:
    queue = f"q-{uuid4().hex[:8]}"
    first = await ward.stack.start_worker(HOLDFAST_TASK_QUEUE=queue, HOLDFAST_FAULT="kill:reserved@write_summary")
    run = await ward.admit(queue)
    assert await asyncio.to_thread(first.wait, PATIENCE_S), "it is killed"
    second = await ward.stack.start_worker(HOLDFAST_TASK_QUEUE=queue)
    try:
        await run.approve()
        result = await run.ended()
    finally:
        second.signal(signal.SIGKILL)
    assert (result.outcome, result.failures) == (RunOutcome.COMPLETED, 0)
    calls = Counter(each.key.removeprefix(f"{result.key_base}/") for each in ward.record.requests(f"{run.id}/"))
    assert {number: calls[number] for number in "12345"} == dict.fromkeys("12345", 1)
    turns = Counter(each.key for each in ModelRecord(ward.stack.home / "model.db").calls(f"{result.key_base}/turn-"))
    assert set(turns.values()) == {1}
    assert len(run.effects("messages")) == 2
