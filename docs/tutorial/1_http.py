"""The agent meetings: it reserves a room over HTTP and invites people."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from holdfast import AgentSpec, Effect, StepSpec, ToolContext, Undo, tool


class Meeting(BaseModel):
    model_config = ConfigDict(extra="forbid")

    topic: str = "Roadmap"
    people: list[str] = ["ada@example.com", "bo@example.com"]


@tool(effect=Effect.IDEMPOTENT, service="rooms")
async def reserve_room(ctx: ToolContext, topic: str, seats: int) -> dict[str, str]:
    """Reserve a room with so many seats."""
    url = f"{ctx.service_url('rooms')}/bookings"
    answer = await ctx.http.post(url, json={"topic": topic, "seats": seats}, headers={"Idempotency-Key": ctx.key})
    answer.raise_for_status()
    return answer.json()


@reserve_room.undo
async def release_room(ctx: ToolContext, undo: Undo) -> str | None:
    answer = await ctx.http.delete(f"{ctx.service_url('rooms')}/bookings", params={"key": undo.key})
    if answer.status_code == 404:
        return None  # it never happened
    answer.raise_for_status()
    return "room released"


@tool(effect=Effect.IDEMPOTENT, service="mail", approval=True)
def invite(ctx: ToolContext, people: list[str], text: str) -> dict[str, int]:
    """Send the invitation. A person has to approve it."""
    _note(ctx, ctx.key).write_text(f"To: {', '.join(people)}\n\n{text}")
    return {"invited": len(people)}


def _note(ctx: ToolContext, key: str) -> Path:
    return ctx.workspace / f"{key.replace('/', '.')}.txt"


SPEC = AgentSpec(
    name="meetings",
    description="Reserves a room and invites people to it.",
    instructions="You are meetings. Reserve a room for the meeting, invite the people to it, then say how it ended.",
    input=Meeting,
    tools=(reserve_room, invite),
    steps=(StepSpec(name="room", tools=["reserve_room"]), StepSpec(name="invitation", tools=["invite"])),
)
