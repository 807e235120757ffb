"""An encrypted run in Temporal's Web UI, in a real browser: nothing to read, until its reader signs in."""

import asyncio
import json
import os
import re
from base64 import b64encode
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from holdfast.dev.stack import Stack, without_ours
from tests.fixtures.stack import Cli, until
from tests.system.ui.test_web_ui import browser, current_details, page, status_of, visit  # noqa: F401

TOKEN = "a long and random token"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with encryption on, and a reader's token."""
    added = {
        "HOLDFAST_ENCRYPTION_KEYS": f"k1:{b64encode(os.urandom(32)).decode()}",
        "HOLDFAST_CODEC_TOKEN": TOKEN,
    }
    stack = Stack(tmp_path_factory.mktemp("sealed"), {**without_ours(os.environ), **added}, durable=False)
    try:
        asyncio.run(stack.start())
        yield stack
    finally:
        stack.stop(grace_s=0)


def test_the_web_ui_shows_a_run_in_plain_text_to_whoever_has_signed_in(sealed: Stack, page: Page) -> None:  # noqa: F811
    cli = Cli(sealed.environment)
    run = json.loads(cli("run", "discharge", "--input", '{"patient_id": "pat-1"}', "--json").stdout)["workflow_id"]
    until(lambda: len(status_of(cli, run).approvals) == 2)
    visit(page, sealed, run, "Timeline")
    expect(page.get_by_role("button", name="Event tool: Completed").first).to_be_visible()
    assert "pat-1" not in page.inner_text("body")

    page.goto(sealed.codec_url)
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("You are signed in.")).to_be_visible()
    visit(page, sealed, run, "Timeline")
    page.get_by_test_id("data-encoder-status").click()
    page.get_by_text("Use my browser setting").click()
    page.get_by_test_id("data-encoder-endpoint-input").fill(sealed.codec_url)
    page.get_by_text("Include cross-origin credentials").click()
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    visit(page, sealed, run, "Timeline")
    expect(page.get_by_text("pat-1").first).to_be_visible()
    expect(page.get_by_text(re.compile(r"• #1 read_record \(records\)$")).first).to_be_visible()
    visit(page, sealed, run, "User Metadata")
    expect(current_details(page).locator("body")).to_contain_text("Waiting for a human: notify_patient")
