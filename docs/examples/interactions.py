"""The agent interactions: a list, the last result or a template answers for a drug service that is down."""

from datetime import timedelta

from pydantic import BaseModel

from holdfast import AgentSpec, Effect, Json, LastGood, StepSpec, ToolContext, ToolFailed, tool

HARMLESS = {"paracetamol"}


class Medication(BaseModel):
    name: str


class Prescription(BaseModel):
    items: list[Medication]


@tool(effect=Effect.READ, service="formulary")
def local_formulary(ctx: ToolContext, items: list[Medication]) -> Json:
    """Look the medication up in the hospital's own list."""
    if unknown := {each.name for each in items} - HARMLESS:
        raise ToolFailed(f"the list does not know {', '.join(unknown)}")
    return {"checked": True, "interactions": []}


@tool(effect=Effect.READ, service="drugs", per_minute=60, fallback=(local_formulary, LastGood(timedelta(hours=6))))
async def check_interactions(ctx: ToolContext, items: list[Medication]) -> Json:
    """Check the medication for interactions."""
    answer = await ctx.http.get(f"{ctx.service_url('drugs')}/check", params={"name": [each.name for each in items]})
    return answer.raise_for_status().json()


@check_interactions.template
def not_checked(ctx: ToolContext, items: list[Medication]) -> Json:
    return {"checked": False, "note": "a pharmacist has to check these"}


SPEC = AgentSpec(
    name="interactions",
    description="Checks a prescription.",
    instructions="Check the prescription for interactions, then say what you found.",
    input=Prescription,
    tools=(check_interactions,),
    steps=(StepSpec(name="check", tools=["check_interactions"]),),
)
