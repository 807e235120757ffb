"""What the server's own database holds of a run, with encryption on and off; and runs that live through its changes."""

from __future__ import annotations

import asyncio
import json
import os
import re
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr
from temporalio.client import Client, WorkflowHandle, WorkflowHistory
from temporalio.converter import WorkflowSerializationContext
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Replayer

from holdfast.authoring.tools import Tool, ToolContext, Undo, tool
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ToolFailed
from holdfast.contracts.people import Approval, ApprovalDecision, DecisionReply, Verdict
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import RunOutcome
from holdfast.engine.client import data_converter, sandbox
from holdfast.settings import Settings
from holdfast.testing.model import call, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, a_runtime, cancelled, dev_server, until
from tests.fixtures.payloads import deployed
from tests.fixtures.temporal import temporal_cli
from tests.fixtures.world import agent
from workflows.agent import AgentWorkflow

NAME = "Wilhelmina Quastenflosse"
DIAGNOSIS = "Morbus Beispielus stage four"
MESSAGE = "Dear Frau Quastenflosse, your zebrafish tablets are ready"
DOSE = "zebrafish-tablets-40mg"
ERROR = "connection string pharmacist:swordfish-9 refused"
COMMENT = "phoned her daughter Kunigunde first"
UNDONE = "bed 17 given to nobody"
FINAL = "Quastenflosse went home by taxi"
PLANTED = (NAME, DIAGNOSIS, MESSAGE, DOSE, ERROR, COMMENT, UNDONE, FINAL)
OLD, NEW = (f"{id}:{b64encode(os.urandom(32)).decode()}" for id in ("k1", "k2"))


class Patient(BaseModel):
    name: str


def tools() -> tuple[Tool, ...]:
    @tool(effect=Effect.READ, service="records")
    async def read_record(ctx: ToolContext, name: str) -> Json:
        """The record of a patient."""
        return {"name": name, "diagnosis": DIAGNOSIS}

    @tool(effect=Effect.IDEMPOTENT, service="pharmacy", retries=0)
    async def order(ctx: ToolContext, item: str) -> str:
        """Fails, and says too much."""
        raise ToolFailed(ERROR)

    @tool(effect=Effect.IDEMPOTENT, service="beds")
    async def book(ctx: ToolContext, name: str) -> str:
        """Books a bed."""
        return f"bed for {name}"

    @book.undo
    async def unbook(ctx: ToolContext, undo: Undo) -> str:
        return UNDONE

    @tool(effect=Effect.IDEMPOTENT, service="messages", approval=True)
    async def send(ctx: ToolContext, text: str) -> str:
        """Sends a message, with a person's yes."""
        return f"sent: {text}"

    return read_record, order, book, send


@asynccontextmanager
async def a_server(file: Path) -> AsyncIterator[WorkflowEnvironment]:
    async with await dev_server(dev_server_database_filename=str(file)) as env:
        yield env


SCRIPT = sequence(
    call(("read_record", {"name": NAME}), ("book", {"name": NAME})),
    call(("order", {"item": DOSE})),
    call(("send", {"text": MESSAGE})),
    {"role": "assistant", "content": FINAL},
)


async def decided(handle: WorkflowHandle[Any, Any], verdict: Verdict = Verdict.APPROVE) -> DecisionReply:
    (asked,) = await handle.query("approvals", result_type=list[Approval])
    assert asked.arguments == {"text": MESSAGE}
    decision = ApprovalDecision(approval_id=asked.id, verdict=verdict, approver="dr.lee", comment=COMMENT)
    return await handle.execute_update("decide", decision, result_type=DecisionReply)


def waits(now: Any) -> bool:
    return bool(now.approvals)


async def tell(stage: Stage) -> tuple[WorkflowHandle[Any, Any], WorkflowHandle[Any, Any]]:
    """A run that ends well, and one that is cancelled while it waits for a person."""
    spec = agent(*tools(), steps=[], input=Patient)
    stage.model.script = SCRIPT
    async with stage.worker():
        handle = await stage.start(spec, {"name": NAME})
        await until(handle, waits)
        assert (await decided(handle)).accepted
        assert (await handle.result()).summary == FINAL
        second = await stage.start(spec, {"name": NAME})
        await until(second, waits)
        await second.signal("decide", {"approval_id": "a99", "verdict": "approve", "approver": NAME})
        await until(second, lambda now: any(NAME in note for note in now.notes))
        await second.cancel()
        await cancelled(second)
    return handle, second


def found(file: Path) -> list[str]:
    """Which of the planted texts stand in the server's files, as raw bytes."""
    raw = b"".join(each.read_bytes() for each in file.parent.glob(f"{file.name}*"))
    assert len(raw) > 100_000
    return [text for text in PLANTED if text.encode() in raw or json.dumps(text).encode() in raw]


@pytest.mark.parametrize("keys", [OLD, ""], ids=["encrypted", "plain"])
async def test_nothing_of_a_run_can_be_read_in_the_servers_database(tmp_path: Path, sqlite_url: str, keys: str) -> None:
    file = tmp_path / "server" / "temporal.db"
    file.parent.mkdir()
    async with (
        a_server(file) as env,
        deployed(env, sqlite_url, keys) as client,
        a_runtime(sqlite_url) as (runtime, model),
    ):
        stage = Stage(client, runtime, model)
        handles = await tell(stage)
        for handle in handles:
            await Replayer(
                workflows=[AgentWorkflow], workflow_runner=sandbox(), data_converter=client.data_converter
            ).replay_workflow(await handle.fetch_history())
        assert found(file) == ([] if keys else list(PLANTED))


@pytest.fixture
async def plain(temporal: WorkflowEnvironment, sqlite_url: str) -> AsyncIterator[Stage]:
    """A stage without keys."""
    async with deployed(temporal, sqlite_url) as client, a_runtime(sqlite_url) as (runtime, model):
        yield Stage(client, runtime, model)


async def test_a_run_under_way_goes_on_when_encryption_is_turned_on_and_keys_are_rotated(
    temporal: WorkflowEnvironment, plain: Stage, sqlite_url: str
) -> None:
    spec = agent(*tools(), steps=[], input=Patient)
    asking = call(("send", {"text": MESSAGE}))
    plain.model.script = sequence(asking, asking, asking, {"role": "assistant", "content": FINAL})
    async with plain.worker():
        handle = await plain.start(spec, {"name": NAME})
        await until(handle, waits)
    for keys in (OLD, f"{NEW},{OLD}"):
        async with deployed(temporal, sqlite_url, keys) as client:
            stage = replace(plain, client=client)
            handle = client.get_workflow_handle_for(AgentWorkflow.run, handle.id)
            async with stage.worker(max_cached_workflows=0):
                before = (await until(handle, waits)).calls
                assert (await decided(handle)).accepted
                await until(handle, lambda now, n=before: now.calls > n and bool(now.approvals))
    async with deployed(temporal, sqlite_url, f"{NEW},{OLD}") as client, replace(plain, client=client).worker():
        handle = client.get_workflow_handle_for(AgentWorkflow.run, handle.id)
        assert (await decided(handle)).accepted
        result = await handle.result()
        assert (result.outcome, result.summary) == (RunOutcome.COMPLETED, FINAL)
        assert {*ids_of(await handle.fetch_history())} == {"k1", "k2"}


async def test_without_its_key_a_run_waits_and_says_which_key_is_missing(
    temporal: WorkflowEnvironment, plain: Stage, sqlite_url: str
) -> None:
    spec = agent(*tools(), steps=[], input=Patient)
    plain.model.script = sequence(call(("send", {"text": MESSAGE})), {"role": "assistant", "content": FINAL})
    async with deployed(temporal, sqlite_url, OLD) as client, replace(plain, client=client).worker():
        handle = await replace(plain, client=client).start(spec, {"name": NAME})
        await until(handle, waits)
    asked = ApprovalDecision(approval_id="a1", verdict=Verdict.APPROVE, approver="dr.lee")
    async with deployed(temporal, sqlite_url, NEW) as client, replace(plain, client=client).worker():
        blind = client.get_workflow_handle(handle.id)
        await blind.signal("decide", asked)
        assert (await task_failure(client, blind)).endswith(
            "a payload is encrypted with key 'k1' (here are: k2): add that key to HOLDFAST_ENCRYPTION_KEYS"
        )
    async with deployed(temporal, sqlite_url, f"{NEW},{OLD}") as client, replace(plain, client=client).worker():
        result = await client.get_workflow_handle_for(AgentWorkflow.run, handle.id).result()
        assert result.outcome is RunOutcome.COMPLETED


async def task_failure(client: Client, handle: WorkflowHandle[Any, Any]) -> str:
    """Waits for a workflow task that fails; its cause, as this client reads it."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async for event in handle.fetch_history_events():
                if event.HasField("workflow_task_failed_event_attributes"):
                    failure = event.workflow_task_failed_event_attributes.failure
                    return str(await client.data_converter.decode_failure(failure))
            await asyncio.sleep(0.05)


def ids_of(history: WorkflowHistory) -> list[str]:
    """Key ids of the payloads of a history."""
    texts = re.findall(r'"encryption-key-id": "([^"]*)"', json.dumps(history.to_json_dict()))
    return [b64decode(text).decode() for text in texts]


async def test_a_decision_typed_by_hand_counts_also_with_encryption_on(
    temporal: WorkflowEnvironment, plain: Stage, sqlite_url: str
) -> None:
    spec = agent(*tools(), steps=[], input=Patient)
    plain.model.script = sequence(call(("send", {"text": MESSAGE})), {"role": "assistant", "content": FINAL})
    async with deployed(temporal, sqlite_url, OLD) as client:
        stage = replace(plain, client=client)
        async with stage.worker():
            handle = await stage.start(spec, {"name": NAME})
            await until(handle, waits)
            typed = '{"approval_id": "a1", "verdict": "approve", "approver": "dr.lee"}'
            sent = await temporal_cli(
                stage, "workflow", "signal", "--workflow-id", handle.id, "--name", "decide", "--input", typed
            )
            assert sent.returncode == 0, sent.stderr
            result = await handle.result()
            assert [each.decision.approver for each in result.decisions] == ["dr.lee"]


async def test_no_part_of_the_converter_looks_at_a_context(sqlite_url: str) -> None:
    """The worker does not tell one (`engine.client._Sandbox`): whatever looks would see another in a client."""
    converter = data_converter(Settings(encryption_keys=SecretStr(OLD), database_url=sqlite_url), "default")
    assert converter.with_context(WorkflowSerializationContext(namespace="default", workflow_id="w")) is converter
