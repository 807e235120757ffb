"""Takes the screenshots of the README from a real run: `uv run python -m docs.images.take`. Needs Debian's chromium."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import httpx2
from playwright.async_api import Locator, Page, async_playwright

from holdfast.contracts.run import RunStatus
from holdfast.dev.stack import Stack, without_ours
from holdfast.engine.client import DATA_CONVERTER, Client
from holdfast.engine.starting import start_run
from holdfast.state.opening import open_database
from holdfast.state.runs import Runs

HERE = Path(__file__).parent
NAVIGATION = 256
"""Width of the bar on the left, in pixels."""
RUN_S = 90


async def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        stack = Stack(Path(home), without_ours(os.environ), durable=False)
        try:
            await stack.start()
            run = await waiting_run(stack)
            await take(stack.ui_url, run)
        finally:
            stack.stop(grace_s=0)


async def waiting_run(stack: Stack) -> str:
    """Runs the demo's run up to its question and returns its id: insurance fails twice, the pharmacy hangs."""
    async with httpx2.AsyncClient(base_url=f"{stack.hospital_url}/faults/") as hospital:
        await hospital.put("insurance", json={"mode": "fail", "times": 2, "status": 503})
        await hospital.put("pharmacy", json={"mode": "hang", "method": "POST"})
    client = await Client.connect(stack.temporal_address, data_converter=DATA_CONVERTER)
    store = await open_database(stack.store_url)
    try:
        value = {"patient_id": "pat-1", "physician": "dr.lee"}
        started = await start_run(
            client, Runs(store), "discharge", value, task_queue="holdfast", request_key="ward-3", requested_by="ward 3"
        )
    finally:
        await store.close()
    handle = client.get_workflow_handle(started.workflow_id)
    async with asyncio.timeout(RUN_S):
        status = await handle.query("status", result_type=RunStatus)
        while sum(each.kind == "tool" for each in status.approvals) < 2:
            await asyncio.sleep(0.2)
            status = await handle.query("status", result_type=RunStatus)
    return started.workflow_id


async def take(ui_url: str, run: str) -> None:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        page = await browser.new_page(viewport={"width": 1400, "height": 1000})
        await page.goto(f"{ui_url}/namespaces/default/workflows/{run}")
        await page.get_by_text("turn 4").first.wait_for()
        await shoot(page, "timeline.png", page.get_by_role("tab", name="Timeline"), None)
        # Narrow, so that the page stacks its parts; high, so that it needs no scrolling.
        await page.set_viewport_size({"width": 1000, "height": 2200})
        await page.get_by_role("tab", name="User Metadata").click()
        first_command = (
            page.frame_locator("iframe#user-metadata-current-details").locator("pre").nth(1)
        )  # after its JSON
        await first_command.wait_for()
        await shoot(page, "approval.png", page.get_by_text("Current Details", exact=True), first_command)
        await browser.close()


async def shoot(page: Page, name: str, first: Locator, last: Locator | None) -> None:
    """Takes the part right of the navigation bar, from the first element to the last (None: the end of the window)."""
    size = page.viewport_size
    top, bottom = await first.bounding_box(), await last.bounding_box() if last else None
    assert size and top
    y, end = top["y"] - 20, bottom["y"] + bottom["height"] + 20 if bottom else size["height"]
    await page.screenshot(
        path=HERE / name,
        clip={"x": NAVIGATION, "y": y, "width": size["width"] - NAVIGATION, "height": end - y},
        animations="disabled",
    )


if __name__ == "__main__":
    asyncio.run(main())
