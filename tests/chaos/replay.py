"""Replays what a program has run."""

from __future__ import annotations

from temporalio.client import Client
from temporalio.worker import Replayer

from holdfast.temporal import DATA_CONVERTER, sandbox
from workflows.agent import AgentWorkflow


async def replay_error(client: Client, workflow_id: str) -> str:
    history = await client.get_workflow_handle(workflow_id).fetch_history()
    replayer = Replayer(workflows=[AgentWorkflow], workflow_runner=sandbox(), data_converter=DATA_CONVERTER)
    while True:
        try:
            await replayer.replay_workflow(history)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            if "TMPRL1101" not in str(error):
                return str(error)[:500]
        else:
            return ""
