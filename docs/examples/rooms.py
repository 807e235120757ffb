"""The agent rooms: its tool calls a service, tells the model of its mistakes, and lets errors through."""

from pydantic import BaseModel

from holdfast import AgentSpec, Effect, Json, StepSpec, ToolContext, ToolRefused, tool


class Meeting(BaseModel):
    topic: str


@tool(effect=Effect.IDEMPOTENT, service="rooms")
async def reserve_room(ctx: ToolContext, topic: str, seats: int) -> Json:
    """Reserve a room with so many seats."""
    url = ctx.service_url("rooms") + "/reservations"  # HOLDFAST_SERVICES='{"rooms": "https://…"}' for the workers
    answer = await ctx.http.post(url, headers={"Idempotency-Key": ctx.key}, json={"topic": topic, "seats": seats})
    if answer.status_code == 409:
        raise ToolRefused("no such room is free; ask for fewer seats")  # the model reads it and may do otherwise
    answer.raise_for_status()  # 429, 5xx, time-outs are tried again; 400, 401, 403 are not
    return answer.json()


SPEC = AgentSpec(
    name="rooms",
    description="Reserves a room.",
    instructions="Reserve a room for the meeting, then say how it ended.",
    input=Meeting,
    tools=(reserve_room,),
    steps=(StepSpec(name="room", tools=["reserve_room"]),),
)
