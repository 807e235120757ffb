"""Tests meetings with its real service, on a real Temporal server: a yes, a no that undoes, and the service down."""

import runpy
from collections.abc import AsyncIterator

import httpx2
import pytest

from agents.meetings.script import decide
from agents.meetings.spec import SPEC, Meeting
from holdfast import Json
from holdfast.files import ROOT
from holdfast.testing import Stage, served, until


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """Serves both services at one address, with nothing booked and nobody invited."""
    app = runpy.run_path(str(ROOT / "docs/tutorial/service.py"))["app"]
    async with served(app) as url:
        monkeypatch.setenv("HOLDFAST_SERVICES", f'{{"rooms": "{url}", "mail": "{url}"}}')
        yield url


async def outcome(stage: Stage, verdict: str) -> str:
    """Returns the outcome of a run whose invitation gets this verdict."""
    stage.model.script = lambda messages: decide(messages, ()) or {}
    async with stage.worker():
        run = await stage.start(SPEC, Meeting().model_dump())
        await until(run, lambda status: bool(status.approvals))
        await run.signal("decide", {"approval_id": "a2", "verdict": verdict, "approver": "you", "comment": "because"})
        return (await run.result()).outcome


async def record(service: str) -> Json:
    async with httpx2.AsyncClient() as http:
        return (await http.get(service)).json()


async def test_a_yes_sends_one_invitation(service: str, lite: Stage) -> None:
    assert await outcome(lite, "approve") == "completed"
    assert {name: len(each) for name, each in (await record(service)).items()} == {"bookings": 1, "invitations": 1}


async def test_a_no_releases_the_room(service: str, lite: Stage) -> None:
    assert await outcome(lite, "reject") == "rejected"
    assert await record(service) == {"bookings": {}, "invitations": []}


@pytest.fixture
def away(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_SERVICES", f'{{"rooms": "http://127.0.0.1:1", "mail": "{service}"}}')


async def test_the_front_desk_stands_in_for_a_service_that_is_away(service: str, away: None, lite: Stage) -> None:
    assert await outcome(lite, "approve") == "completed"
    (note,) = lite.workspace(SPEC).iterdir()
    assert note.read_text().startswith("Roadmap: a room with 2 seats")
    assert (await record(service))["bookings"] == {}
