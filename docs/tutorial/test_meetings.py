"""Tests meetings with its real service, on a real Temporal server: a yes, a no that undoes, and the service down."""

import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx2
import pytest

from agents.meetings.script import decide
from agents.meetings.spec import SPEC, Meeting
from holdfast import Json
from holdfast.dev.stack import ROOT
from tests.fixtures.stack import until as soon
from tests.fixtures.temporal import Stage, until


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Starts both services in one process. The last test looks for rooms at another address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("HOLDFAST_SERVICES", f'{{"rooms": "{url}", "mail": "{url}"}}')
    process = subprocess.Popen([sys.executable, ROOT / "docs/tutorial/service.py", port])

    def answers() -> bool:
        try:
            return httpx2.get(url).is_success
        except httpx2.TransportError:
            return False

    soon(answers)
    yield url
    process.kill()
    process.wait()


async def outcome(stage: Stage, verdict: str) -> str:
    """Returns the outcome of a run whose invitation gets this verdict."""
    stage.model.script = lambda messages: decide(messages, ()) or {}
    async with stage.worker():
        run = await stage.start(SPEC, Meeting().model_dump())
        await until(run, lambda status: bool(status.approvals))
        await run.signal("decide", {"approval_id": "a2", "verdict": verdict, "approver": "you", "comment": "because"})
        return (await run.result()).outcome


def record(service: str) -> Json:
    return httpx2.get(service).json()


async def test_a_yes_sends_one_invitation(service: str, lite: Stage) -> None:
    assert await outcome(lite, "approve") == "completed"
    assert (len(record(service)["bookings"]), len(record(service)["invitations"])) == (1, 1)


async def test_a_no_releases_the_room(service: str, lite: Stage) -> None:
    assert await outcome(lite, "reject") == "rejected"
    assert record(service) == {"bookings": {}, "invitations": []}


@pytest.fixture
def away(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_SERVICES", f'{{"rooms": "http://127.0.0.1:1", "mail": "{service}"}}')


async def test_the_front_desk_stands_in_for_a_service_that_is_away(service: str, away: None, lite: Stage) -> None:
    assert await outcome(lite, "approve") == "completed"
    (note,) = lite.workspace(SPEC).iterdir()
    assert note.read_text().startswith("Roadmap: a room with 2 seats")
    assert record(service)["bookings"] == {}
