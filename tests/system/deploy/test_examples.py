"""The agents that the pages show, of docs/examples and README.md, run on a real Temporal server and call a service."""

import json
from collections.abc import Callable

import pytest
from pytest_httpserver import HTTPServer
from temporalio.worker import Replayer, Worker

from docs.examples import films, interactions, patched, rooms, week
from docs.examples.test_rooms import test_a_retry_has_the_same_key as test_a_retry_has_the_same_key
from holdfast.authoring import registry
from holdfast.authoring.agent import AgentSpec
from holdfast.contracts.data import Json
from holdfast.contracts.run import RunOutcome, RunResult
from holdfast.engine.starting import start_run
from holdfast.state.runs import Runs
from holdfast.testing.model import call, say, sequence
from holdfast.testing.stage import Stage, until
from tests.system.docs.blocks import PAGES, blocks

Reach = Callable[[str], None]


@pytest.fixture
def reach(lite: Stage, httpserver: HTTPServer) -> Reach:
    """Makes the test's own server the address of a service."""

    def at(service: str) -> None:
        lite.runtime.settings.services[service] = httpserver.url_for("").rstrip("/")

    return at


async def end(stage: Stage, spec: AgentSpec, given: Json) -> RunResult:
    registry.add(spec)
    async with stage.worker():
        return await (await stage.start(spec, given)).result()


def read(stage: Stage) -> list[str]:
    """The outcomes of calls in the last request to the model."""
    return [each["content"] for each in stage.model.requests[-1][1] if each["role"] == "tool"]


async def test_the_agent_of_the_readme_reserves_a_room_under_its_key(
    lite: Stage, httpserver: HTTPServer, reach: Reach
) -> None:
    (block,) = blocks(PAGES[0], "python")
    shown: dict[str, AgentSpec] = {}
    exec(compile(block.text, str(block), "exec"), shown)
    spec = registry.add(shown["SPEC"])
    reach("rooms")
    httpserver.expect_request("/bookings", method="POST").respond_with_json({"room": "the small one"}, status=201)
    lite.model.script = sequence(call(("reserve_room", {"topic": "Roadmap", "seats": 2})), say("done"))
    async with lite.worker():
        run = await lite.start(spec, {"topic": "Roadmap"})
        (asked,) = (await until(run, lambda status: bool(status.approvals))).approvals
        assert httpserver.log == []
        await run.signal("decide", {"approval_id": asked.id, "verdict": "approve", "approver": "ada"})
        result = await run.result()
    assert result.outcome is RunOutcome.COMPLETED
    ((request, _),) = httpserver.log
    assert request.json == {"topic": "Roadmap", "seats": 2}
    assert request.headers["Idempotency-Key"].startswith(f"{run.id}/")


async def test_what_a_service_refuses_the_model_corrects(lite: Stage, httpserver: HTTPServer, reach: Reach) -> None:
    reach("rooms")
    httpserver.expect_ordered_request("/reservations", method="POST").respond_with_data(status=409)
    httpserver.expect_ordered_request("/reservations", method="POST").respond_with_json({"room": "the small one"})
    many, few = ({"topic": "Roadmap", "seats": seats} for seats in (40, 4))
    lite.model.script = sequence(call(("reserve_room", many)), call(("reserve_room", few)), say("done"))
    assert (await end(lite, rooms.SPEC, {"topic": "Roadmap"})).outcome is RunOutcome.COMPLETED
    refused, reserved = read(lite)
    assert "ask for fewer seats" in refused and "the small one" in reserved


async def test_a_batch_has_a_run_for_each_topic_and_reports(lite: Stage, httpserver: HTTPServer, reach: Reach) -> None:
    reach("rooms")
    httpserver.expect_request("/reservations").respond_with_json({"room": "the small one"})
    lite.model.script = sequence(call(("reserve_room", {"topic": "one of them", "seats": 4})), say("done"))
    registry.add(rooms.SPEC)
    registry.add_batch(week.BATCH)
    async with lite.worker():
        topics = {"topics": ["Roadmap", "Budget"]}
        started = await start_run(lite.client, Runs(lite.runtime.db), "week", topics, task_queue=lite.queue)
        result: RunResult = await lite.client.get_workflow_handle(started.workflow_id, result_type=RunResult).result()
    assert result.outcome is RunOutcome.COMPLETED
    assert result.items is not None and result.items.done == len(httpserver.log) == 2
    assert (lite.runtime.settings.home / "workspace" / started.workflow_id / "failures.txt").read_text() == ""


async def test_a_job_is_submitted_once_and_asked_for_until_it_is_done(
    lite: Stage, httpserver: HTTPServer, reach: Reach
) -> None:
    reach("films")
    httpserver.expect_ordered_request("/jobs", method="POST").respond_with_json({"id": "job-1"})
    httpserver.expect_ordered_request("/jobs/job-1").respond_with_json({"state": "running", "percent": 40})
    httpserver.expect_ordered_request("/jobs/job-1").respond_with_json({"state": "done", "film": "film-1.mp4"})
    lite.model.script = sequence(call(("render", {"script": "A door opens."})), say("done"))
    assert (await end(lite, films.SPEC, {"script": "A door opens."})).outcome is RunOutcome.COMPLETED
    assert read(lite) == ["film-1.mp4"]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("paracetamol", {"checked": True, "interactions": []}),
        ("warfarin", {"checked": False, "note": "a pharmacist has to check these"}),
    ],
)
async def test_while_the_service_is_down_its_fallbacks_answer_in_their_order(
    lite: Stage, name: str, answer: Json
) -> None:
    lite.runtime.settings.services["drugs"] = "http://127.0.0.1:1"
    items = {"items": [{"name": name}]}
    lite.model.script = sequence(call(("check_interactions", items)), say("done"))
    assert (await end(lite, interactions.SPEC, items)).outcome is RunOutcome.COMPLETED
    (told,) = read(lite)
    assert "in place of check_interactions" in told and json.loads(told.partition("\n")[2]) == answer


async def test_a_run_from_before_a_patch_replays_on_the_code_that_has_it(lite: Stage) -> None:
    def worker(kind: type) -> Worker:
        return Worker(lite.client, task_queue="patched", workflows=[kind])

    async with worker(patched.Before):
        before = await lite.client.start_workflow("Handover", id="before", task_queue="patched")
        await before.result()
    async with worker(patched.Handover):
        after = await lite.client.start_workflow("Handover", id="after", task_queue="patched")
        await after.signal("sign", "ada")
        await after.result()
    replayer = Replayer(workflows=[patched.Handover])
    for handle in (before, after):
        await replayer.replay_workflow(await handle.fetch_history())
