"""Webhooks from the command line: what is refused at the door, a test event, and the receiver that the docs show."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from uuid import uuid4

import pytest
from pytest_httpserver import HTTPServer
from starlette.testclient import TestClient

from tests.fixtures.receiver import SECRET
from tests.fixtures.stack import Cli, until

INPUT = '{"patient_id": "pat-1"}'
PAGE = Path(__file__).parents[3] / "docs/reference/guarantees/webhooks.md"


@pytest.mark.parametrize(
    ("url", "hosts", "said"),
    [
        ("ftp://example.com/x", "", "http or https"),
        ("example.com/x", "", "http or https"),
        ("https://kim:hunter2@example.com/x", "", "contains credentials"),
        ("https://example.org/x", "hooks.example.com *.example.net", "HOLDFAST_WEBHOOK_HOSTS"),
        ("https://hooks.example.com@example.org/x", "hooks.example.com", "contains credentials"),
        ("https://example.org\\@hooks.example.com/x", "hooks.example.com", "contains credentials"),
        ("https://example.org#hooks.example.com", "hooks.example.com", "HOLDFAST_WEBHOOK_HOSTS"),
        ("http://[::1/x", "", "is not a valid URL"),
    ],
)
def test_an_address_that_nothing_is_sent_to_is_refused_at_the_door(cli: Cli, url: str, hosts: str, said: str) -> None:
    done = cli("run", "discharge", "-i", INPUT, "--webhook", url, HOLDFAST_WEBHOOK_HOSTS=hosts)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "hunter2" not in done.stderr


def test_what_the_default_address_does_not_take_can_be_looked_at_and_dropped(cli: Cli) -> None:
    run = cli("run", "discharge", "-i", INPUT, "--id", uuid4().hex[:8], HOLDFAST_WEBHOOK_URL="http://127.0.0.1:9/hook")
    id = run.stdout.strip()

    def letters() -> list[dict[str, str]]:
        found = json.loads(cli("dlq", "list", "--kind", "hook", "--json").stdout)
        return [each for each in found if each["workflow_id"] == id]

    until(letters)  # the stack's worker has no secret to sign with
    letter = letters()[0]
    shown = cli("dlq", "show", letter["id"]).stdout
    assert f"run.needs_input of {id} was not delivered: http://127.0.0.1:9/hook" in shown
    assert "HOLDFAST_WEBHOOK_SECRET" in shown
    assert f"dlq replay {letter['id']}" in shown
    again = cli("dlq", "replay", letter["id"], "--yes")
    assert again.returncode == 1
    assert "HOLDFAST_WEBHOOK_SECRET" in again.stdout
    assert cli("dlq", "drop", letter["id"], "--why", "no receiver").returncode == 0


def test_a_test_event_is_signed_and_its_answer_told(cli: Cli, httpserver: HTTPServer) -> None:
    httpserver.expect_oneshot_request("/hook", method="POST").respond_with_data(status=202)
    taken = cli("webhooks", "test", httpserver.url_for("/hook"), HOLDFAST_WEBHOOK_SECRET=SECRET)
    assert taken.returncode == 0, taken.stderr
    assert "answered 202" in taken.stdout
    httpserver.expect_oneshot_request("/hook", method="POST").respond_with_data(status=400)
    refused = cli("webhooks", "test", httpserver.url_for("/hook"), "--json", HOLDFAST_WEBHOOK_SECRET=SECRET)
    assert refused.returncode == 1
    assert "answered 400" in json.loads(refused.stdout)["said"]
    unsigned = cli("webhooks", "test", httpserver.url_for("/hook"))
    assert unsigned.returncode == 2
    assert "HOLDFAST_WEBHOOK_SECRET" in unsigned.stderr


def test_the_receiver_of_the_page_takes_it_once_and_refuses_a_forgery(
    cli: Cli, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    httpserver.expect_request("/hook", method="POST").respond_with_data(status=204)
    assert cli("webhooks", "test", httpserver.url_for("/hook"), HOLDFAST_WEBHOOK_SECRET=SECRET).returncode == 0
    request, _ = httpserver.log[0]
    body = request.get_data()
    headers = {name.lower(): value for name, value in request.headers.items() if name.lower().startswith("webhook-")}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.setitem(os.environ, "WEBHOOK_SECRET", SECRET)
    shown: dict[str, object] = {}
    exec(compile(code, PAGE, "exec"), shown)
    lines: list[tuple[object, ...]] = []
    shown["print"] = lambda *words: lines.append(words)
    client = TestClient(shown["app"])  # pyright: ignore[reportArgumentType]
    assert client.post("/holdfast", content=body, headers=headers).status_code == 204
    assert client.post("/holdfast", content=body, headers=headers).status_code == 204
    assert lines == [("webhook.test", {})]
    assert client.post("/holdfast", content=body + b" ", headers=headers).status_code == 401


@pytest.mark.parametrize("secret", ["hunter2", "whsec_c2hvcnQ=", f"{SECRET} nonsense", "whsec_n!t base64"])
def test_a_secret_that_is_none_is_refused_and_not_repeated(cli: Cli, secret: str) -> None:
    done = cli("webhooks", "test", "http://127.0.0.1:9", HOLDFAST_WEBHOOK_SECRET=secret)
    assert done.returncode == 2
    assert "HOLDFAST_WEBHOOK_SECRET" in done.stderr
    assert secret not in done.stderr
