"""Patient discharge: six steps, of which three may be left to a person."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from agents.discharge import tools
from agents.discharge.prompts import INSTRUCTIONS
from holdfast import AgentSpec, BreakerRule, Service, StepSpec


class DischargeInput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    patient_id: tools.PatientId
    physician: Annotated[str, Field(pattern=r"^[\w.@-]{1,64}$", description="approves the messages")] = "dr.lee"


def _optional(name: str, title: str, tool: str, role: str, minutes: int) -> StepSpec:
    """Returns a step that does not block the discharge. Left pending, the role usually settles it within `minutes`."""
    return StepSpec(name=name, title=title, tools=[tool], critical=False, role=role, review_s=60 * minutes)


SPEC = AgentSpec(
    name="discharge",
    description="Prepares a patient's discharge: insurance, medication, follow-up, summary, messages.",
    instructions=INSTRUCTIONS,
    input=DischargeInput,
    tools=(
        tools.read_record,
        tools.read_orders,
        tools.verify_insurance,
        tools.order_medication,
        tools.book_appointment,
        tools.write_summary,
        tools.notify_patient,
        tools.notify_providers,
    ),
    steps=(
        StepSpec(name="record", title="Record and orders", tools=["read_record", "read_orders"]),
        _optional("insurance", "Insurance verification", "verify_insurance", "billing", minutes=15),
        _optional("pharmacy", "Pharmacy coordination", "order_medication", "pharmacist", minutes=5),
        _optional("appointments", "Follow-up appointments", "book_appointment", "scheduling desk", minutes=10),
        StepSpec(name="summary", title="Discharge summary", tools=["write_summary"]),
        StepSpec(name="notify", title="Notifications", tools=["notify_patient", "notify_providers"]),
    ),
    services=(
        # A flaky service that is worth five retries: the circuit breaker opens only when nearly every call fails.
        Service("insurance", breaker=BreakerRule(failures=None, share=0.9, window_s=120, min_calls=12)),
    ),
)
