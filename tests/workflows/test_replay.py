"""Runs that began on older code go on with this one: every committed history replays.

A red test here means that runs in flight would get stuck at the next deploy. Guard the change with `workflow.patched`;
never record the history again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from temporalio.client import WorkflowHistory

from holdfast.engine.client import DATA_CONVERTER
from tests.fixtures import replay as replaying

# As the first landed version wrote them. Each is pinned by its digest: recording one anew would prove nothing.
FIRST = {
    "cancelled": "ce1af20527b7956d",
    "cancelled_in_flight": "5979a7f6b303d46d",
    "completed": "938628b19cd1cf0f",
    "continued_1": "eea4dffb8bcdc571",
    "continued_2": "ed5431d181556990",
    "continued_3": "7bb38f495f5e8955",
    "failed": "1e7c2a1a78234dab",
    "parked": "4c0387d74ccadad8",
    "partial": "ca56da4ae9b45a3c",
    "rejected": "895cacb432a50b12",
    "waiting": "91a9a863776cffa0",
}
HISTORIES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "histories").glob("*.json"))}


async def replay(text: str) -> None:
    # Under the id that it had: the ids of children follow from it.
    workflow_id = json.loads(text)["events"][0]["workflowExecutionStartedEventAttributes"]["workflowId"]
    history = WorkflowHistory.from_json(workflow_id, text)
    failed = await replaying.replay([replaying.Execution(workflow_id, "", history)], DATA_CONVERTER)
    assert not failed, str(failed[0])


@pytest.mark.parametrize("name", HISTORIES)
async def test_a_committed_history_replays(name: str) -> None:
    await replay(HISTORIES[name].read_text())


@pytest.mark.parametrize("name", FIRST)
async def test_a_history_written_by_the_first_landed_version_replays(name: str) -> None:
    text = HISTORIES[name].read_text()
    assert hashlib.sha256(text.encode()).hexdigest().startswith(FIRST[name]), "recorded again: restore it from git"
    await replay(text)


@pytest.mark.parametrize("kind", ["AgentWorkflow", "RepairWorkflow", "OrphanSweep", "DeliveryWorkflow"])
def test_every_workflow_that_outlives_a_deploy_is_among_them(kind: str) -> None:
    first = (json.loads(path.read_text())["events"][0] for path in HISTORIES.values())
    assert kind in {each["workflowExecutionStartedEventAttributes"]["workflowType"]["name"] for each in first}


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("completed", "WORKFLOW_EXECUTION_COMPLETED"),
        ("partial", "WORKFLOW_EXECUTION_COMPLETED"),
        ("settled", "WORKFLOW_EXECUTION_COMPLETED"),
        ("put_off", "WORKFLOW_EXECUTION_COMPLETED"),
        ("repaired", "WORKFLOW_EXECUTION_COMPLETED"),
        ("swept", "WORKFLOW_EXECUTION_COMPLETED"),
        ("unwound", "WORKFLOW_EXECUTION_COMPLETED"),
        ("rejected", "WORKFLOW_EXECUTION_COMPLETED"),
        ("failed", "WORKFLOW_EXECUTION_FAILED"),
        ("cancelled", "WORKFLOW_EXECUTION_CANCELED"),
        ("waiting", ""),
        ("continued_1", "WORKFLOW_EXECUTION_CONTINUED_AS_NEW"),
        ("continued_2", "WORKFLOW_EXECUTION_CONTINUED_AS_NEW"),
    ],
)
def test_every_way_a_run_can_stand_is_among_them(name: str, end: str) -> None:
    events = json.loads(HISTORIES[name].read_text())["events"]
    last = events[-1]["eventType"].removeprefix("EVENT_TYPE_")
    assert (last if last.startswith("WORKFLOW_EXECUTION") else "") == end


@pytest.mark.parametrize(
    ("name", "patched"),
    [("partial", False), ("put_off", True), ("settled", True), ("completed", False), ("together", True)],
)
def test_both_sides_of_a_patch_are_among_them(name: str, patched: bool) -> None:
    events = json.loads(HISTORIES[name].read_text())["events"]
    assert any(event["eventType"] == "EVENT_TYPE_MARKER_RECORDED" for event in events) is patched


async def test_another_order_of_commands_is_noticed() -> None:
    text = HISTORIES["completed"].read_text()
    with pytest.raises(Exception, match="Nondeterminism"):
        await replay(text.replace('"name": "plan"', '"name": "think"'))
