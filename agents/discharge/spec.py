"""Patient discharge: six steps, of which three may be left to a person."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from agents.discharge import tools
from agents.discharge.prompts import INSTRUCTIONS
from holdfast.agent import AgentSpec, StepSpec


class DischargeInput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    patient_id: tools.PatientId
    physician: Annotated[str, Field(pattern=r"^[\w.@-]{1,64}$", description="approves the messages")] = "dr.lee"


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
        StepSpec(name="record", tools=["read_record", "read_orders"]),
        StepSpec(name="insurance", tools=["verify_insurance"], critical=False, role="billing"),
        StepSpec(name="pharmacy", tools=["order_medication"], critical=False, role="pharmacist"),
        StepSpec(name="appointments", tools=["book_appointment"], critical=False, role="scheduling desk"),
        StepSpec(name="summary", tools=["write_summary"]),
        StepSpec(name="notify", tools=["notify_patient", "notify_providers"]),
    ),
)
