"""What a person finds in Temporal's Web UI, in a real browser: what waits, how to answer it, how to stop a run."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Browser, FrameLocator, Page, expect, sync_playwright

from holdfast.contracts.run import RunOutcome, RunResult, RunStatus
from holdfast.dev.simulation.hospital import HospitalRecord
from holdfast.dev.stack import Stack
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.stack import Cli, until

CHROMIUM = Path("/usr/bin/chromium")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
)
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists() and not os.environ.get("CI"):
        pytest.skip(f"no {CHROMIUM}: install Debian's package `chromium`, as .ci/run does")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1400, "height": 1200})
    yield page
    page.screenshot(path=tmp_path / "end.png", full_page=True)  # for whoever looks into a failure
    page.close()


@pytest.fixture
def waiting(cli: Cli) -> str:
    """A discharge that waits for the physician's two approvals."""
    started = cli("run", "discharge", "--input", '{"patient_id": "pat-1"}', "--json")
    assert started.returncode == 0, started.stderr
    run = json.loads(started.stdout)["workflow_id"]
    until(lambda: len(status_of(cli, run).approvals) == 2)
    return run


def status_of(cli: Cli, run: str) -> RunStatus:
    return RunStatus.model_validate(json.loads(cli("status", run, "--json").stdout)["status"])


def result_of(cli: Cli, run: str) -> RunResult:
    return RunResult.model_validate(json.loads(cli("result", run, "--json").stdout)["result"])


def visit(page: Page, stack: Stack, run: str, tab: str) -> None:
    page.goto(f"{stack.ui_url}/namespaces/default/workflows/{run}")
    page.get_by_role("tab", name=tab).click()


def current_details(page: Page) -> FrameLocator:
    """The page that the run keeps up to date: the Web UI renders its Markdown in a frame of its own."""
    return page.frame_locator("iframe#user-metadata-current-details")


def commands(page: Page) -> list[str]:
    """The commands of the page; the data of a Signal is beside each of them."""
    shown = current_details(page).locator("pre").all_inner_texts()
    return [text for text in shown if text.startswith("temporal workflow signal")]


def paste(command: str, stack: Stack, name: str) -> None:
    """Runs a command of the page as a reader does, who puts in a name and, where the page wants one, a reason."""
    assert "YOUR NAME" in command
    command = command.replace("WHAT WAS DONE", "ordered by telephone").replace('"WHY"', '"not in the record"')
    ran = subprocess.run(
        ["sh", "-c", f"{command.strip().replace('YOUR NAME', name)} --address {stack.temporal_address}"],
        env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(stack.home)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_page_shows_what_waits_and_the_command_as_shown_answers_it(
    page: Page, stack: Stack, cli: Cli, waiting: str
):
    visit(page, stack, waiting, "User Metadata")
    details = current_details(page).locator("body")
    expect(details).to_contain_text("Waiting for a human: notify_patient, notify_providers")
    expect(details).to_contain_text("✓ Record and orders: done")
    expect(details).to_contain_text("Notifications: waiting")
    for approval in status_of(cli, waiting).approvals:
        expect(details).to_contain_text(f"Waiting for a human: approval {approval.id}")
        assert approval.arguments["text"][:60] in details.inner_text(), "what is to be sent has to be readable"
    shown = [text for text in commands(page) if '"approve"' in text]
    assert len(shown) == 2

    for command in shown:
        paste(command, stack, "dr.lee")
    cli("follow", waiting)
    result = result_of(cli, waiting)
    assert result.outcome is RunOutcome.COMPLETED
    assert [each.decision.approver for each in result.decisions] == ["dr.lee", "dr.lee"]


def test_the_data_as_shown_answers_it_in_the_web_ui(page: Page, stack: Stack, cli: Cli, waiting: str):
    """As the page says: More Actions, Send a Signal, `decide`, and the JSON that it shows."""
    asked = json.loads(cli("approvals", waiting, "--json").stdout)
    page.goto(asked[0]["url"])  # where it is seen, without another click
    expect(current_details(page).locator("body")).to_contain_text("More Actions, Send a Signal, decide")
    shown = current_details(page).locator("pre").all_inner_texts()
    data = [text for text in shown if text.startswith("{") and '"approve"' in text]
    assert len(data) == 2

    for each in data:
        page.get_by_role("button", name="More Actions").click()
        page.get_by_role("menu").get_by_text("Send a Signal").first.click()
        page.get_by_role("button", name="Select a signal").click()
        page.get_by_role("option", name="decide").first.click()
        page.locator(".cm-content:visible").first.click()
        page.keyboard.press("Control+A")  # the form keeps what was sent last
        page.keyboard.insert_text(each.replace("YOUR NAME", "dr.lee"))
        page.get_by_role("button", name="Submit").locator("visible=true").click()
        expect(page.get_by_role("button", name="Select a signal").locator("visible=true")).to_have_count(0)
    cli("follow", waiting)
    result = result_of(cli, waiting)
    assert result.outcome is RunOutcome.COMPLETED
    assert [each.decision.approver for each in result.decisions] == ["dr.lee", "dr.lee"]


@pytest.mark.parametrize(
    ("verdict", "becomes"),
    [
        ("happened", "✓ Pharmacy coordination: done (settled by ph.kim)"),
        ("did_not", "· Pharmacy coordination: todo"),  # the agent hears of it and may order again
    ],
    ids=["happened", "did not"],
)
def test_the_page_asks_the_pharmacist_and_each_command_as_shown_settles_it(
    page: Page, stack: Stack, cli: Cli, verdict: str, becomes: str
):
    cli("breakers", "reset", "pharmacy")
    fault = {"mode": "fail", "times": 1}
    httpx2.put(f"{stack.hospital_url}/faults/pharmacy", json=fault, timeout=PATIENCE_S).raise_for_status()
    run = json.loads(cli("run", "discharge", "--input", '{"patient_id": "pat-1"}', "--json").stdout)["workflow_id"]
    until(lambda: len(status_of(cli, run).approvals) == 3)
    visit(page, stack, run, "User Metadata")
    details = current_details(page).locator("body")
    expect(details).to_contain_text("Pharmacy coordination: question o4, for pharmacist review")
    shown = [text for text in commands(page) if '"o4"' in text]
    assert len(shown) == 2
    (command,) = [text for text in shown if f'"{verdict}"' in text]
    paste(command, stack, "ph.kim")
    until(lambda: not any(each.id == "o4" for each in status_of(cli, run).approvals))
    page.reload()
    expect(details).to_contain_text(becomes)


def test_the_timeline_names_every_turn_and_call(page: Page, stack: Stack, cli: Cli, waiting: str):
    visit(page, stack, waiting, "Timeline")
    for summary in ("turn 1", "#1 read_record (records)", "#4 order_medication (pharmacy)", "turn 4"):
        expect(page.get_by_text(re.compile(rf"• {re.escape(summary)}$")).first).to_be_visible()


def test_search_attributes_say_agent_stage_and_status(page: Page, stack: Stack, waiting: str):
    visit(page, stack, waiting, "Search Attributes")
    attributes = page.get_by_text("HoldfastAgent")
    expect(attributes.first).to_be_visible()
    shown = json.loads(re.search(r"\{[^{}]*HoldfastAgent[^{}]*\}", page.inner_text("body")).group())  # pyright: ignore[reportOptionalMemberAccess]
    assert shown["HoldfastAgent"] == "discharge"
    assert shown["HoldfastStatus"] == "waiting-human"
    assert shown["HoldfastStage"] == "notify"
    assert shown["HoldfastTenant"] == "default"


def test_the_button_for_cancelling_unwinds_the_run(page: Page, stack: Stack, cli: Cli, waiting: str):
    visit(page, stack, waiting, "Timeline")
    page.get_by_role("button", name="Request Cancellation").click()
    page.get_by_role("dialog").get_by_role("button", name="Confirm").click()
    until(lambda: cli("result", waiting, "--json").returncode == 0)
    result = result_of(cli, waiting)
    assert result.outcome is RunOutcome.CANCELLED
    record = HospitalRecord(stack.home / "hospital.db").effects(f"{result.key_base}/")
    # In reverse: the appointment was booked after the order, so it goes first.
    assert [effect.kind for effect in record if effect.kind.startswith("cancel")] == ["cancel-booking", "cancel-order"]
    assert not [effect for effect in record if effect.kind == "message"]
    visit(page, stack, waiting, "User Metadata")
    expect(page.get_by_text("Canceled", exact=False).first).to_be_visible()
    expect(current_details(page).locator("body")).to_contain_text("undo of #5 book_appointment: undone")
