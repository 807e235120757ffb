"""Runs that began on older code go on with this one: every committed history replays.

A red test here means that runs in flight would get stuck at the next deploy. Guard the change with `workflow.patched`;
never record the history again.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer

from holdfast.temporal import DATA_CONVERTER, sandbox
from workflows.agent import AgentWorkflow

HISTORIES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "histories").glob("*.json"))}


async def replay(name: str, text: str) -> None:
    replayer = Replayer(workflows=[AgentWorkflow], workflow_runner=sandbox(), data_converter=DATA_CONVERTER)
    await replayer.replay_workflow(WorkflowHistory.from_json(name, text))


@pytest.mark.parametrize("name", HISTORIES)
async def test_a_committed_history_replays(name: str) -> None:
    await replay(name, HISTORIES[name].read_text())


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("completed", "WORKFLOW_EXECUTION_COMPLETED"),
        ("partial", "WORKFLOW_EXECUTION_COMPLETED"),
        ("settled", "WORKFLOW_EXECUTION_COMPLETED"),
        ("put_off", "WORKFLOW_EXECUTION_COMPLETED"),
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


async def test_another_order_of_commands_is_noticed() -> None:
    text = HISTORIES["completed"].read_text()
    with pytest.raises(Exception, match="Nondeterminism"):
        await replay("changed", text.replace('"name": "plan"', '"name": "think"'))
