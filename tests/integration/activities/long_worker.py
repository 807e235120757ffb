"""A worker process with an agent whose tool takes long and tells how far it has come, to be killed in the middle."""

from __future__ import annotations

from holdfast.authoring import registry
from holdfast.authoring.agent import AgentSpec
from holdfast.authoring.tools import ToolContext, tool
from holdfast.cli.ending import end_process
from holdfast.contracts.profile import Effect
from tests.fixtures.world import Anything


@tool(effect=Effect.IDEMPOTENT, service="archive", timeout=60)
async def copy_pages(ctx: ToolContext, url: str, pages: int) -> str:
    """Copies pages, one request each."""
    begin = ctx.position or 0
    for page in range(begin, pages):
        (await ctx.http.post(f"{url}/{page}", headers={"Idempotency-Key": ctx.key})).raise_for_status()
        ctx.advance(page + 1)
    return f"attempt {ctx.attempt} copied from page {begin}"


SPEC = registry.add(AgentSpec("long-copy", "test", "test", Anything, (copy_pages,)))

if __name__ == "__main__":
    import worker

    end_process(worker.main())
