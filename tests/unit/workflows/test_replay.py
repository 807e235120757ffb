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
from holdfast.testing import replay as replaying

# As version 0.2.0 wrote them. Each is pinned by its digest: recording one anew would prove nothing.
RECORDED = {
    "asked_twice": "3b60e3124b0669f4",
    "batch_1": "ea314c0d61af6ef4",
    "batch_2": "505ecfdb07fab51c",
    "batch_3": "308165cfef9d5ec7",
    "batch_cancelled": "88b75ebd7259b703",
    "batch_item": "33124517c2287c96",
    "cancelled": "57d2a8b8c3f65fc8",
    "cancelled_in_flight": "0de30c2d14eb7986",
    "completed": "393f9bc155f09754",
    "continued_1": "b30c98e27a7cc0ec",
    "continued_2": "e7ee3d182135f86d",
    "continued_3": "44dc0af562d2fda4",
    "deferred": "04c4496b02246695",
    "dropped": "975743225d235f12",
    "early": "8a549e14b882734a",
    "failed": "4f4b755d3d793849",
    "looked_back": "b8cc130bc059d20a",
    "parked": "51ada45ef8620c53",
    "partial": "4197ee8ec172e44a",
    "rejected": "06be7459dd2232ff",
    "repaired": "8fb1de2222c8499a",
    "settled": "b7ac5ae1ae58f795",
    "swept": "0464d743a8e325e5",
    "together": "f37903078907da4f",
    "undelivered": "6b7fabb7826d8f7c",
    "unwound": "57687ebd05aedbe7",
    "waiting": "1c77590c7ca89995",
    "with_webhook": "31feb85aa6a4fb83",
    "withdrawn": "5cc9850ec7a73054",
}
HISTORIES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "histories").glob("*.json"))}


async def replay(text: str) -> None:
    # Under the id that it had: the ids of children follow from it.
    workflow_id = json.loads(text)["events"][0]["workflowExecutionStartedEventAttributes"]["workflowId"]
    history = WorkflowHistory.from_json(workflow_id, text)
    failed = await replaying.replay([replaying.Execution(workflow_id, "", history)], DATA_CONVERTER)
    assert not failed, str(failed[0])


@pytest.mark.parametrize("name", HISTORIES)
async def test_a_committed_history_replays(name: str) -> None:
    await replay(HISTORIES[name].read_text())


def test_no_history_was_recorded_again_or_lost() -> None:
    """A new history gets a line in RECORDED. One of these that differs has to be restored from git."""
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in HISTORIES.items()}
    assert digests == RECORDED


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
        ("deferred", "WORKFLOW_EXECUTION_COMPLETED"),
        ("repaired", "WORKFLOW_EXECUTION_COMPLETED"),
        ("swept", "WORKFLOW_EXECUTION_COMPLETED"),
        ("unwound", "WORKFLOW_EXECUTION_COMPLETED"),
        ("rejected", "WORKFLOW_EXECUTION_COMPLETED"),
        ("failed", "WORKFLOW_EXECUTION_FAILED"),
        ("cancelled", "WORKFLOW_EXECUTION_CANCELED"),
        ("waiting", ""),
        ("looked_back", "WORKFLOW_EXECUTION_COMPLETED"),
        ("continued_1", "WORKFLOW_EXECUTION_CONTINUED_AS_NEW"),
        ("continued_2", "WORKFLOW_EXECUTION_CONTINUED_AS_NEW"),
    ],
)
def test_every_way_a_run_can_stand_is_among_them(name: str, end: str) -> None:
    events = json.loads(HISTORIES[name].read_text())["events"]
    last = events[-1]["eventType"].removeprefix("EVENT_TYPE_")
    assert (last if last.startswith("WORKFLOW_EXECUTION") else "") == end


async def test_another_order_of_commands_is_noticed() -> None:
    text = HISTORIES["completed"].read_text()
    with pytest.raises(Exception, match="Nondeterminism"):
        await replay(text.replace('"name": "plan"', '"name": "think"'))
