"""The agent meetings, now with limits, a breaker of its own, and a front desk as the fallback for the service."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from holdfast import AgentSpec, BreakerRule, Effect, Service, StepSpec, ToolContext, Undo, tool


class Meeting(BaseModel):
    model_config = ConfigDict(extra="forbid")

    topic: str = "Roadmap"
    people: list[str] = ["ada@example.com", "bo@example.com"]


@tool(effect=Effect.IDEMPOTENT, service="desk")
def ask_the_desk(ctx: ToolContext, topic: str, seats: int) -> dict[str, str]:
    """Leave a note at the front desk, which finds a room by hand."""
    _note(ctx, ctx.key).write_text(f"{topic}: a room with {seats} seats, please")
    return {"room": "the front desk will say"}


@ask_the_desk.undo
def withdraw(ctx: ToolContext, undo: Undo) -> str | None:
    if not _note(ctx, undo.key).exists():
        return None
    _note(ctx, undo.key).unlink()
    return "note withdrawn"


def _note(ctx: ToolContext, key: str) -> Path:
    return ctx.workspace / f"{key.replace('/', '.')}.txt"


@tool(effect=Effect.IDEMPOTENT, service="rooms", per_minute=60, fallback=(ask_the_desk,))
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


@tool(effect=Effect.PROBE, service="mail", approval=True, settles_within=10)
async def invite(ctx: ToolContext, people: list[str], text: str) -> dict[str, bool]:
    """Send the invitation. A person has to approve it."""
    body = {"reference": ctx.key, "people": people, "text": text}
    answer = await ctx.http.post(f"{ctx.service_url('mail')}/invitations", json=body)
    answer.raise_for_status()
    return answer.json()


@invite.probe
async def invited(ctx: ToolContext, people: list[str], text: str) -> dict[str, bool] | None:
    answer = await ctx.http.get(f"{ctx.service_url('mail')}/invitations", params={"reference": ctx.key})
    if answer.status_code == 404:
        return None  # it was not sent
    answer.raise_for_status()
    return answer.json()


SPEC = AgentSpec(
    name="meetings",
    description="Reserves a room and invites people to it.",
    instructions="You are meetings. Reserve a room for the meeting, invite the people to it, then say how it ended.",
    input=Meeting,
    tools=(reserve_room, invite),
    steps=(StepSpec(name="room", tools=["reserve_room"]), StepSpec(name="invitation", tools=["invite"])),
    services=(
        Service("rooms", requests_per_minute=120, breaker=BreakerRule(failures=2, probe_after_s=15)),
        Service("mail", breaker=BreakerRule(failures=None, share=0.9, window_s=120, min_calls=12)),
    ),
)
