"""The agent films: its tool submits a job and polls for it."""

from pydantic import BaseModel

from holdfast import AgentSpec, Effect, NotReady, StepSpec, ToolContext, ToolFailed, tool


class Film(BaseModel):
    script: str


@tool(effect=Effect.IDEMPOTENT, service="films", deadline=86_400)
async def render(ctx: ToolContext, script: str) -> str:
    """Renders a film."""
    films = ctx.service_url("films")
    if ctx.position is None:
        job = await ctx.http.post(f"{films}/jobs", json={"script": script}, headers={"Idempotency-Key": ctx.key})
        id = job.raise_for_status().json()["id"]
        raise NotReady(f"{id} is submitted", after=5, position=id)
    job = (await ctx.http.get(f"{films}/jobs/{ctx.position}")).raise_for_status().json()
    if job["state"] == "failed":
        raise ToolFailed(f"{ctx.position} failed: {job['reason']}")
    if job["state"] != "done":
        raise NotReady(f"{ctx.position} is at {job['percent']} %")
    return job["film"]


SPEC = AgentSpec(
    name="films",
    description="Renders a film.",
    instructions="Render the film, then say where it is.",
    input=Film,
    tools=(render,),
    steps=(StepSpec(name="film", tools=["render"]),),
)
