"""Mail triage of a clinic: classifies a message; then one of three desks, with its own prompt and tools, answers it.

It has its own graph: START → classify → clinical | appointments | billing, each in a loop with its tools. When the
model is unsure, a person chooses the desk.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from agents.triage.prompts import CLASSIFY
from agents.triage.tools import clinic_facts, open_ticket, send_reply
from holdfast import AgentSpec, StepSpec


class Mail(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: Annotated[str, Field(min_length=1, max_length=4000)]
    sender: Annotated[str, Field(min_length=1, max_length=200)] = "unknown sender"


SPEC = AgentSpec(
    name="triage",
    description="Sorts a clinic's mail: classifies a message, then the desk that it is for answers it.",
    instructions=CLASSIFY,
    input=Mail,
    tools=(clinic_facts, open_ticket, send_reply),
    # Which of the two depends on the desk; a message with neither was not answered.
    steps=(StepSpec(name="answer", title="Ticket or reply", tools=["open_ticket", "send_reply"], one_of=True),),
    graph="agents.triage.graph:GRAPH",
)
