"""A worker process with a tool that submits a job and asks for it, to be killed in the middle."""

from __future__ import annotations

from typing import Any

from holdfast.authoring import registry
from holdfast.authoring.agent import AgentSpec
from holdfast.authoring.tools import NotReady, ToolContext, tool
from holdfast.cli.ending import end_process
from holdfast.contracts.profile import Effect
from tests.fixtures.world import Anything


async def render(ctx: ToolContext, url: str, after: float = 0.01) -> str:
    """Renders a film."""
    if ctx.position is None:
        submitted = await ctx.http.post(f"{url}/jobs", headers={"Idempotency-Key": ctx.key})
        job = submitted.raise_for_status().json()["id"]
        raise NotReady(f"{job} is submitted", after=0, position=job)
    job = ctx.position
    percent = (await ctx.http.get(f"{url}/jobs/{job}")).raise_for_status().json()["percent"]
    if percent < 100:
        raise NotReady(f"{job} is at {percent} %", after=after)
    return f"{job} is done"


def rendering(effect: Effect, service: str = "films", **declared: Any) -> Any:
    """The tool, of this effect class."""
    made = tool(effect=effect, service=service, name="render", **declared)(render)
    if effect is Effect.PROBE:

        @made.probe
        async def ask(ctx: ToolContext, url: str, after: float) -> str | None:
            raise AssertionError("an attempt that ended with NotReady leaves nothing to ask")

    return made


SPEC = registry.add(AgentSpec("polling", "test", "test", Anything, (rendering(Effect.MANUAL),)))

if __name__ == "__main__":
    import worker

    end_process(worker.main())
