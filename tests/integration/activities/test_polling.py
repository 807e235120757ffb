"""An external job is asked for until it is ready: no failure, no history, and never a second job."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import WorkflowHandle

from holdfast.authoring.services import BreakerRule, Service
from holdfast.authoring.tools import NotReady, ToolContext, tool
from holdfast.cli.stuck import in_flight
from holdfast.contracts.data import Json
from holdfast.contracts.people import Approval
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import RunOutcome
from holdfast.contracts.turn import OutcomeStatus
from holdfast.engine.executions import describe
from holdfast.reliability.ledger import Ledger, State
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, until
from tests.fixtures.jobs import Jobs
from tests.fixtures.world import agent
from tests.integration.activities.polling_worker import SPEC, rendering
from tests.integration.activities.processes import workers

EFFECTS = [Effect.IDEMPOTENT, Effect.PROBE, Effect.MANUAL]


async def begun(stage: Stage, made: Any, jobs: Jobs, **more: Any) -> WorkflowHandle[Any, Any]:
    """A run that renders one film."""
    stage.model.script = sequence(call(("render", {"url": jobs.url})), say("done"))
    return await stage.start(agent(made, **more))


async def run(stage: Stage, made: Any, jobs: Jobs, **more: Any) -> tuple[Any, WorkflowHandle[Any, Any]]:
    """A run that renders one film, to its end."""
    handle = await begun(stage, made, jobs, **more)
    return await handle.result(), handle


async def asked_about(stage: Stage, made: Any) -> tuple[Approval, Jobs]:
    """What a person is asked about the film, and the jobs that there are by then."""
    async with Jobs().serve() as jobs, stage.worker():
        handle = await begun(stage, made, jobs)
        (asked,) = (await until(handle, lambda s: bool(s.approvals))).approvals
        await handle.terminate()
    return asked, jobs


async def events(handle: WorkflowHandle[Any, Any]) -> list[str]:
    return [event.WhichOneof("attributes") or "" for event in (await handle.fetch_history()).events]


@pytest.mark.parametrize("effect", EFFECTS)
async def test_a_job_is_submitted_once_however_often_it_is_asked_for(stage: Stage, effect: Effect) -> None:
    async with Jobs(polls_needed=20).serve() as jobs, stage.worker():
        result, _ = await run(stage, rendering(effect, retries=0), jobs)
    assert result.outcome is RunOutcome.COMPLETED
    assert (len(jobs.jobs), jobs.polls, result.failures) == (1, 20, 0)
    assert list(jobs.jobs.values()) == [f"{result.key_base}/1"]
    entry = await Ledger(stage.runtime.db, "").entry(f"{result.key_base}/1")
    assert entry is not None
    assert (entry.state, entry.failures, entry.log) == (State.DONE, 0, [])


async def test_history_is_the_same_for_one_poll_and_for_many(lite: Stage) -> None:
    async with lite.worker():
        async with Jobs(polls_needed=1).serve() as quick:
            _, once = await run(lite, rendering(Effect.IDEMPOTENT), quick)
        async with Jobs(polls_needed=60).serve() as slow:
            _, often = await run(lite, rendering(Effect.IDEMPOTENT), slow)
        assert (quick.polls, slow.polls) == (1, 60)
        assert await events(once) == await events(often)


async def at_work(handle: WorkflowHandle[Any, Any]) -> int:
    """The process that has polled last."""
    (pending,) = (await handle.describe()).raw_description.pending_activities
    return int(pending.last_worker_identity.partition("@")[0])


@pytest.mark.parametrize(("hangs_at", "after"), [(0, 0.3), (3, 0.01)], ids=["between two polls", "within a poll"])
async def test_a_killed_worker_leaves_the_job_to_another_which_submits_no_second(
    lite: Stage, tmp_path: Path, hangs_at: int, after: float
) -> None:
    async with (
        Jobs(polls_needed=12, hangs_at=hangs_at).serve() as jobs,
        workers(lite, tmp_path, "polling_worker") as processes,
    ):
        lite.model.script = sequence(call(("render", {"url": jobs.url, "after": after})), say("done"))
        handle = await lite.start(SPEC)
        async with asyncio.timeout(PATIENCE_S):
            while jobs.polls < 3:
                await asyncio.sleep(0.01)
            doomed = processes[await at_work(handle)]
            doomed.signal(signal.SIGKILL)
            result = await handle.result()
        assert not doomed.alive
    assert result.outcome is RunOutcome.COMPLETED
    assert len(jobs.jobs) == 1


async def test_polls_that_fail_now_and_then_are_no_chain_of_failures(lite: Stage) -> None:
    quiet = Service("quiet-films", breaker=BreakerRule(failures=None, share=1.0))
    async with Jobs(polls_needed=12, errors=[503, 0] * 5).serve() as jobs, lite.worker():
        result, _ = await run(lite, rendering(Effect.MANUAL, quiet.name, retries=1), jobs, services=(quiet,))
    assert result.outcome is RunOutcome.COMPLETED
    assert len(jobs.jobs) == 1


async def test_the_job_goes_on_after_its_service_was_down_for_a_while(lite: Stage) -> None:
    touchy = Service("touchy-films", breaker=BreakerRule(failures=1, probe_after_s=2.0))
    async with Jobs(polls_needed=6, errors=[0, 0, 503]).serve() as jobs, lite.worker():
        lite.model.script = sequence(call(("render", {"url": jobs.url})), say("done"), say("done"))
        handle = await lite.start(agent(rendering(Effect.MANUAL, touchy.name), services=(touchy,)))
        result = await handle.result()
        assert (await events(handle)).count("activity_task_scheduled_event_attributes") == 6  # it was put off
    assert result.outcome is RunOutcome.COMPLETED
    assert (len(jobs.jobs), jobs.polls) == (1, 6)


@pytest.mark.parametrize(
    ("effect", "status"), [(Effect.IDEMPOTENT, OutcomeStatus.UNKNOWN), (Effect.READ, OutcomeStatus.FAILED)]
)
async def test_when_the_deadline_passes_the_last_words_say_where_it_was(
    lite: Stage, effect: Effect, status: OutcomeStatus
) -> None:
    heard: list[str] = []

    def script(messages: list[dict[str, Any]]) -> Any:
        answers = [each["content"] for each in messages if each["role"] == "tool"]
        heard[:] = answers
        return say("done") if answers else call(("render", {"url": jobs.url, "after": 0.2}))

    async with Jobs(polls_needed=10_000).serve() as jobs, lite.worker():
        lite.model.script = script
        handle = await lite.start(agent(rendering(effect, deadline=1.0), steps=[]))
        await until(handle, lambda s: bool(s.calls))
        async with asyncio.timeout(PATIENCE_S):
            while not heard:
                await asyncio.sleep(0.02)
        await handle.terminate()
    assert ("unknown" in heard[0]) is (status is OutcomeStatus.UNKNOWN)
    assert "gave up" in heard[0]
    assert "job-1 is at 0 %" in heard[0]


async def test_a_reader_sees_where_it_is_and_when_it_is_asked_again(lite: Stage) -> None:
    async with Jobs(polls_needed=10_000).serve() as jobs, lite.worker():
        lite.model.script = sequence(call(("render", {"url": jobs.url, "after": 60.0})), say("done"))
        handle = await lite.start(agent(rendering(Effect.IDEMPOTENT)))
        seen: list[Json] = []
        async with asyncio.timeout(PATIENCE_S):
            while not seen or "%" not in seen[0]["said"]:
                await asyncio.sleep(0.02)
                seen = await in_flight(lite.client, await describe(lite.client, handle.id))
        await handle.terminate()
    assert (seen[0]["activity"], seen[0]["attempt"], seen[0]["said"]) == ("tool", 3, "job-1 is at 0 %")
    assert seen[0]["next_at"]


@tool(effect=Effect.MANUAL, service="films", name="render")
async def forgetful(ctx: ToolContext, url: str) -> str:
    """Submits a job and does not say which."""
    await ctx.http.post(f"{url}/jobs", headers={"Idempotency-Key": ctx.key})
    raise NotReady("not yet", after=0.01)


class Id:
    """No JSON."""


@pytest.mark.parametrize("bug", [{"position": Id()}, {"advance": Id()}, {"after": 1e30}, {"position": float("nan")}])
async def test_a_position_that_cannot_be_kept_is_a_bug_and_submits_no_second_job(
    lite: Stage, bug: dict[str, Any]
) -> None:
    @tool(effect=Effect.IDEMPOTENT, service="films", name="render")
    async def mistaken(ctx: ToolContext, url: str) -> str:
        """Submits a job and tells what cannot be kept."""
        await ctx.http.post(f"{url}/jobs", headers={"Idempotency-Key": ctx.key})
        if "advance" in bug:
            ctx.advance(bug["advance"])
        raise NotReady("not yet", **{"after": 0.01, **bug})

    asked, jobs = await asked_about(lite, mistaken)
    assert "ValueError: " in asked.why
    assert len(jobs.jobs) == 1


async def test_a_manual_tool_that_tells_no_position_is_not_called_again(lite: Stage) -> None:
    asked, jobs = await asked_about(lite, forgetful)
    assert "without a position" in asked.why
    assert len(jobs.jobs) == 1
