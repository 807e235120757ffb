"""The test of docs/how-to/own-repository.md: a service that fails once."""

from pydantic import BaseModel

from holdfast import AgentSpec, Effect, Json, ToolContext, tool
from holdfast.authoring import registry
from holdfast.testing import Asked, FakeService, Stage, call, say, sequence


class Seats(BaseModel):
    seats: int


@tool(effect=Effect.IDEMPOTENT, service="rooms")
async def reserve_room(ctx: ToolContext, seats: int) -> Json:
    """Reserve a room with so many seats."""
    answer = await ctx.http.post(ctx.service_url("rooms"), headers={"Idempotency-Key": ctx.key}, json={"seats": seats})
    answer.raise_for_status()
    return answer.json()


SPEC = registry.add(AgentSpec("rooms", "Reserves a room.", "Reserve a room.", Seats, tools=(reserve_room,)))


def book(asked: Asked) -> Json:
    return {"room": "the large one" if asked.body["seats"] > 4 else "the small one"}


async def test_a_retry_has_the_same_key(lite: Stage) -> None:
    lite.model.script = sequence(call(("reserve_room", {"seats": 6})), say("done"))
    async with FakeService.serve(book) as rooms, lite.worker():
        lite.runtime.settings.services["rooms"] = rooms.url
        rooms.failing = [503]
        result = await (await lite.start(SPEC, {"seats": 6})).result()
    assert result.outcome == "completed"
    assert len(rooms.requests) == 2
    assert len({asked.key for asked in rooms.requests}) == 1
