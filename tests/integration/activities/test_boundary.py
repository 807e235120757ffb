"""What leaves an activity is written into history, with its causes: it must hold no address and no key."""

from __future__ import annotations

import pytest
from pytest_httpserver import HTTPServer
from temporalio.api.failure.v1 import Failure

from holdfast.authoring.tools import ToolContext, tool
from holdfast.contracts.profile import Effect
from holdfast.contracts.tool_call import ToolRequest
from holdfast.engine.client import DATA_CONVERTER
from tests.fixtures.world import agent
from tests.integration.activities.conftest import Process
from tests.integration.activities.test_tools import request, run


async def test_a_failure_in_history_holds_no_credentials(process: Process, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/x").respond_with_data("no", status=503)
    address = httpserver.url_for("/x") + "?api_key=TOPSECRET"

    @tool(effect=Effect.IDEMPOTENT, service="x")
    async def fetch(ctx: ToolContext) -> str:
        """Fetch."""
        response = await ctx.http.get(address)
        response.raise_for_status()
        return response.text

    with pytest.raises(Exception, match="answered 503") as caught:
        await run(process, request(fetch))
    failure = Failure()
    await DATA_CONVERTER.encode_failure(caught.value, failure)
    assert "answered 503" in str(failure)
    assert "TOPSECRET" not in str(failure)


async def test_a_deploy_between_effect_and_report_does_not_make_the_model_call_again(process: Process) -> None:
    """The new version asks for an argument that the call does not have: what is known of its key counts, not that."""

    @tool(effect=Effect.IDEMPOTENT, service="x", name="book")
    async def old(ctx: ToolContext) -> str:
        """Book."""
        return "booked"

    @tool(effect=Effect.IDEMPOTENT, service="x", name="book")
    async def new(ctx: ToolContext, day: str) -> str:
        """Book."""
        return f"booked {day}"

    made = request(old)
    assert (await run(process, made)).content == "booked"
    after = ToolRequest(**{**made.model_dump(), "agent": agent(new).name})
    assert (await run(process, after)).content == "booked"
    fresh = after.model_copy(update={"seq": 2})
    assert "day: Field required" in (await run(process, fresh)).content
