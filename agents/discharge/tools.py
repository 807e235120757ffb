"""The tools of the discharge agent. Each effect is sent with its idempotency key."""

from __future__ import annotations

import json
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from agents.discharge.prompts import SUMMARY_INSTRUCTIONS, SUMMARY_TEMPLATE
from holdfast import Effect, Json, ToolContext, ToolRefused, Undo, tool

PatientId = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$", description="the patient's id in the records")]
PATIENCE = 600.0
"""Deadline in seconds of a step that blocks nothing: after it, the step is left pending for its desk."""
Line = Annotated[str, Field(min_length=1, max_length=500)]
Text = Annotated[str, Field(min_length=1, max_length=4000)]


class Medication(BaseModel):
    name: Line
    dosage: str = Field(default="", max_length=500, description="as ordered; empty when the order names none")


async def _request(ctx: ToolContext, method: str, path: str, **options: Any) -> Json | None:
    """Returns the hospital's answer, or None for a 404. Raises httpx2.HTTPError, which the platform classifies."""
    url = ctx.service_url("hospital") + path
    response = await ctx.http.request(method, url, headers={"Idempotency-Key": ctx.key}, **options)
    if response.status_code == 404:
        return None
    response.raise_for_status()
    return response.json()


async def _of_patient(ctx: ToolContext, patient_id: str, method: str, path: str, **options: Any) -> Json:
    """Does the same as `_request`, but raises ToolRefused for a 404, which means that the patient is unknown."""
    answer = await _request(ctx, method, path, **options)
    if answer is None:
        raise ToolRefused(f"the hospital knows no patient {patient_id!r}; check the patient id")
    return answer


# ------------------------------------------------------------------ record, insurance


# Without the record the agent can neither order nor write anything correct, so a run waits for these two.


@tool(effect=Effect.READ, service="records", deferrable=False)
async def read_record(ctx: ToolContext, patient_id: PatientId) -> Json:
    """Read the patient's record: a FHIR bundle with Patient, Encounter and Conditions."""
    return await _of_patient(ctx, patient_id, "GET", f"/records/patients/{patient_id}")


@tool(effect=Effect.READ, service="records", deferrable=False)
async def read_orders(ctx: ToolContext, patient_id: PatientId) -> Json:
    """Read the discharge orders: a FHIR bundle with MedicationRequests and the ServiceRequest for the follow-up."""
    return await _of_patient(ctx, patient_id, "GET", f"/records/patients/{patient_id}/orders")


@tool(effect=Effect.READ, service="insurance", retries=5, deadline=PATIENCE)
async def verify_insurance(ctx: ToolContext, patient_id: PatientId) -> Json:
    """Verify the patient's insurance coverage."""
    return await _of_patient(ctx, patient_id, "POST", "/insurance/verify", json={"patient_id": patient_id})


# ------------------------------------------------------------------ pharmacy, appointments: both honour keys


@tool(effect=Effect.IDEMPOTENT, service="pharmacy", timeout=10, retries=0, deadline=PATIENCE)
async def order_medication(
    ctx: ToolContext, patient_id: PatientId, items: Annotated[list[Medication], Field(min_length=1)]
) -> Json:
    """Order the discharge medication at the pharmacy, all items in one order."""
    body = {"patient_id": patient_id, "items": [item.model_dump() for item in items]}
    return await _of_patient(ctx, patient_id, "POST", "/pharmacy/orders", json=body)


@order_medication.undo
async def cancel_order(ctx: ToolContext, undo: Undo) -> str | None:
    return await _cancel(ctx, "/pharmacy/orders", undo, "pharmacy order")


@tool(effect=Effect.IDEMPOTENT, service="appointments", deadline=PATIENCE)
async def book_appointment(
    ctx: ToolContext,
    patient_id: PatientId,
    reason: Line,
    not_before: date | None = None,
    not_after: date | None = None,
) -> Json:
    """Book the follow-up appointment, within the ordered dates if there are any."""
    body = {"patient_id": patient_id, "reason": reason, "not_before": not_before, "not_after": not_after}
    body = {name: str(value) for name, value in body.items() if value}
    return await _of_patient(ctx, patient_id, "POST", "/appointments", json=body)


@book_appointment.undo
async def cancel_appointment(ctx: ToolContext, undo: Undo) -> str | None:
    return await _cancel(ctx, "/appointments", undo, "appointment")


async def _cancel(ctx: ToolContext, path: str, undo: Undo, what: str) -> str | None:
    """Cancels by the call's key. On a 404 the service also bars the key, and refuses a request that arrives later."""
    cancelled = await _request(ctx, "DELETE", path, params={"key": undo.key})
    return f"{what} cancelled" if cancelled is not None else None


# ------------------------------------------------------------------ summary


@tool(effect=Effect.READ, service="model", timeout=60)
async def write_summary(
    ctx: ToolContext,
    patient_id: PatientId,
    name: Line,
    stay: Line,
    diagnoses: list[str],
    medications: list[str],
    follow_up: str,
    open_points: list[str],
) -> dict[Literal["text", "written_by"], str]:
    """Write the discharge summary from these facts. The answer says who wrote it: a model, or the template."""
    facts: Json = {"patient_id": patient_id, "name": name, "stay": stay, "diagnoses": diagnoses}
    facts |= {"medications": medications, "follow_up": follow_up, "open_points": open_points}
    messages: list[Json] = [
        {"role": "system", "content": SUMMARY_INSTRUCTIONS},
        {"role": "user", "content": json.dumps(facts, ensure_ascii=False)},
    ]
    answer = await ctx.ask_model("summary", messages)
    return {"text": answer.text, "written_by": f"model {answer.model}"}


@write_summary.template
def summary_by_template(ctx: ToolContext, **facts: Any) -> dict[str, str]:
    words = {key: "; ".join(value) if isinstance(value, list) else value for key, value in facts.items()}
    text = SUMMARY_TEMPLATE.format_map({key: value or "none" for key, value in words.items()})
    return {"text": text, "written_by": "template"}


# ------------------------------------------------------------------ messages: the service ignores keys

SETTLES_WITHIN = 20.0
"""Seconds after which the service gives up a message that it could not send."""


async def _send(ctx: ToolContext, patient_id: str, to: list[str], text: str, **more: str) -> Json:
    body = {"reference": ctx.key, "patient_id": patient_id, "to": to, "text": text, **more}
    return await _of_patient(ctx, patient_id, "POST", "/messages", json=body)


async def _sent(ctx: ToolContext, reference: str) -> Json | None:
    """Returns the message that was sent under this reference, or None."""
    found = await _request(ctx, "GET", "/messages", params={"reference": reference})
    messages = found["messages"] if found else []
    return messages[0] if messages else None


@tool(effect=Effect.MANUAL, service="messages", approval=True, role="physician", per_minute=30)
async def notify_patient(
    ctx: ToolContext,
    patient_id: PatientId,
    channel: Literal["phone", "email", "letter", "providers"],
    to: Line,
    text: Text,
) -> Json:
    """Send the patient the discharge message. `to`: phone, e-mail, postal address, or the provider to pass it on."""
    return await _send(ctx, patient_id, [to], text, channel=channel)


@tool(
    effect=Effect.PROBE,
    service="messages",
    approval=True,
    role="physician",
    per_minute=30,
    settles_within=SETTLES_WITHIN,
)
async def notify_providers(
    ctx: ToolContext, patient_id: PatientId, recipients: Annotated[list[Line], Field(min_length=1)], text: Text
) -> Json:
    """Send the discharge summary to the providers who go on caring for the patient."""
    return await _send(ctx, patient_id, recipients, text)


@notify_providers.probe
async def providers_were_notified(ctx: ToolContext, patient_id: str, recipients: list[str], text: str) -> Json | None:
    return await _sent(ctx, ctx.key)


@notify_providers.undo
async def retract(ctx: ToolContext, undo: Undo) -> str | None:
    """Sends the same recipients one retraction, because a message cannot be unsent."""
    first = await _sent(ctx, undo.key)
    if first is None:
        return None
    if await _sent(ctx, ctx.key) is None:
        text = "Please disregard the discharge message sent before; the discharge was not completed."
        await _send(ctx, first["patient_id"], first["to"], text, retracts=undo.key)
    return f"retraction sent to {', '.join(first['to'])}"
