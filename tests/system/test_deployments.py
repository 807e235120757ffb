"""A deploy with runs in flight: two builds as processes of their own, on a real server.

Property: a run finishes on the build that it began with, a new one begins on the current build, and nothing is lost
while a build has no worker; whoever operates it is told so.
"""

import asyncio
import json
import os
import signal
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.api.enums.v1 import EventType
from temporalio.api.workflowservice.v1 import GetSystemInfoRequest
from temporalio.client import Client, WorkflowHandle
from temporalio.worker import Worker

from holdfast.contracts.run import RunOutcome
from holdfast.dev.stack import Child, Stack, StackFailed, without_ours
from holdfast.engine.client import DATA_CONVERTER
from holdfast.engine.deployments import Build, Deployment, DeploymentError, describe
from holdfast.engine.worker import NotReady, versioning
from holdfast.settings import Settings
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage
from tests.fixtures.stack import Cli, replays
from tests.fixtures.temporal import binary
from tests.fixtures.world import World, agent
from workflows.serving import make_worker

Handle = WorkflowHandle[Any, Any]


@pytest_asyncio.fixture
async def versioned(tmp_path: Path) -> AsyncIterator[Stack]:
    """A stack whose workers are to be versioned; none runs yet."""
    stack = Stack(tmp_path, {**without_ours(os.environ), "HOLDFAST_DEPLOYMENT": "ward"}, durable=False)
    # The server looks only every few minutes whether a build has drained.
    fast = (
        "matching.wv.VersionDrainageStatusVisibilityGracePeriod",
        "matching.wv.VersionDrainageStatusRefreshInterval",
    )
    for key in fast:
        stack.services[0].command += ["--dynamic-config-value", f'{key}="1s"']
    try:
        await stack.start(workers=0)
        yield stack
        await replays(stack)
    finally:
        stack.stop(grace_s=0)


async def connected(stack: Stack) -> Client:
    return await Client.connect(stack.temporal_address, data_converter=DATA_CONVERTER)


async def build(client: Client, name: str) -> Build:
    found = [each for each in (await describe(client, "ward")).builds if each.build == name]
    if not found:
        raise DeploymentError(f"no build {name} yet")
    return found[0]


async def start(stack: Stack, client: Client, name: str) -> Child:
    """A worker of a build, once the server has seen it poll."""
    worker = await stack.start_worker(HOLDFAST_BUILD_ID=name)

    async def polls() -> bool:
        try:
            return (await build(client, name)).workers > 0
        except DeploymentError:
            return False

    await until(polls)
    return worker


async def promote(address: str, deployment: str, *to: str) -> bool:
    """Sends new runs to a build, as an operator does: with the Temporal CLI. False when the server refuses."""
    command = [binary("temporal"), "worker", "deployment", "set-current-version", "--deployment-name", deployment]
    done = await asyncio.create_subprocess_exec(
        *command, *to, "--address", address, "--yes", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return await done.wait() == 0


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await holds():
            await asyncio.sleep(0.1)


async def asked(client: Client, cli: Cli, name: str) -> Handle:
    """A new run of the shipped agent, once it waits for a person."""
    said = cli("run", "discharge", "--input", '{"patient_id": "pat-1"}', "--id", name)
    handle = client.get_workflow_handle(said.stdout.split()[0])
    await until(lambda: waits(handle))
    return handle


async def waits(handle: Handle) -> bool:
    return bool(await handle.query("approvals"))


async def decide(handle: Handle, approvals: list[str]) -> None:
    for each in approvals:
        await handle.signal("decide", {"approval_id": each, "verdict": "approve", "approver": "dr.lee"})


async def builds_of(handle: Handle) -> set[str]:
    """The builds whose workers did workflow tasks of the run."""
    events = (await handle.fetch_history()).events
    done = [e for e in events if e.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED]
    return {e.workflow_task_completed_event_attributes.deployment_version.build_id for e in done}


async def test_a_run_finishes_on_its_build_and_new_ones_begin_on_the_current(versioned: Stack):
    cli, client = Cli(versioned.environment), await connected(versioned)
    with pytest.raises(DeploymentError, match="HOLDFAST_BUILD_ID"):
        await describe(client, "ward")
    old = await start(versioned, client, "b1")
    assert "no build is current" in (await describe(client, "ward")).troubles[0]
    assert await promote(versioned.temporal_address, "ward", "--build-id", "b1")
    first = await asked(client, cli, "first")
    approvals = [each["id"] for each in await first.query("approvals")]

    await start(versioned, client, "b2")
    assert await promote(versioned.temporal_address, "ward", "--build-id", "b2")
    second = await asked(client, cli, "second")

    async def counted() -> bool:  # the server's list of runs lags behind
        return (await build(client, "b1")).open_runs == (await build(client, "b2")).open_runs == 1

    await until(counted)
    assert (await build(client, "b1")).state == "draining"
    assert (await build(client, "b2")).state == "current"

    old.signal(signal.SIGTERM)
    assert old.wait(PATIENCE_S)
    await decide(first, approvals)  # kept by the server; no worker of the other build takes it

    async def missed() -> bool:
        return any("build b1" in each for each in (await describe(client, "ward")).troubles)

    await until(missed)  # within seconds, but for a 1.29 server, which counts no backlog of a build
    assert await builds_of(first) == {"b1"}
    found = next(each for each in json.loads(cli("doctor", "--json").stdout) if each["what"] == "deployment")
    assert not found["ok"]
    assert "HOLDFAST_BUILD_ID=b1" in found["to_do"]

    await start(versioned, client, "b1")
    assert (await first.result())["outcome"] in ("completed", "partial")
    assert await builds_of(first) == {"b1"}
    assert await builds_of(second) == {"b2"}

    async def drained() -> bool:
        return (await build(client, "b1")).state == "drained"

    await until(drained)
    assert "b1 drained (0 runs open)" in cli("doctor", "--json").stdout


async def test_workers_without_a_version_beside_a_build_are_told_and_have_a_way_back(versioned: Stack):
    cli, client = Cli(versioned.environment), await connected(versioned)

    def deployment(**environment: str) -> list[dict[str, Any]]:
        return [
            each for each in json.loads(cli("doctor", "--json", **environment).stdout) if each["what"] == "deployment"
        ]

    await versioned.start_worker(HOLDFAST_DEPLOYMENT="")
    assert deployment(HOLDFAST_DEPLOYMENT="") == []
    await start(versioned, client, "b1")
    assert await promote(versioned.temporal_address, "ward", "--build-id", "b1")
    (told,) = deployment(HOLDFAST_DEPLOYMENT="")
    assert "go to build b1 of ward" in told["found"]
    assert "set-current-version --deployment-name ward --unversioned" in told["to_do"]

    assert await promote(versioned.temporal_address, "ward", "--unversioned")
    unversioned = await asked(client, cli, "unversioned")
    assert await builds_of(unversioned) == {""}
    assert deployment(HOLDFAST_DEPLOYMENT="") == []


async def test_a_run_that_continues_as_new_goes_on_with_the_current_build(lite: Stage):
    """Nothing is replayed over this boundary, and a run that goes on for months must not hold its first build."""
    system = await lite.client.workflow_service.get_system_info(GetSystemInfoRequest())
    if system.server_version.startswith("1.29."):
        pytest.skip("a 1.29 server keeps the build over continue-as-new")
    world, name = World(), f"d-{uuid.uuid4().hex[:8]}"
    spec = agent(world.tool("book"), world.tool("send", approval=True), turns_per_execution=1)
    lite.model.script = sequence(call(("send", {})), call(("book", {})), say("done"))

    def worker(build: str) -> Worker:
        settings = lite.runtime.settings.model_copy(update={"deployment": name, "build_id": build})
        return make_worker(lite.client, lite.queue, replace(lite.runtime, settings=settings))

    async def made(build: str) -> bool:
        return await promote(lite.client.service_client.config.target_host, name, "--build-id", build)

    async with worker("b1"):
        await until(lambda: made("b1"))
        handle = await lite.start(spec)
        await until(lambda: waits(handle))
        async with worker("b2"):
            await until(lambda: made("b2"))
            await decide(handle, ["a1"])
            assert (await handle.result()).outcome is RunOutcome.COMPLETED
            first = lite.client.get_workflow_handle(handle.id, run_id=handle.first_execution_run_id)
            assert await builds_of(first) == {"b1"}
            assert await builds_of(lite.client.get_workflow_handle(handle.id)) == {"b2"}


async def test_a_versioned_worker_without_a_build_id_refuses_to_start(versioned: Stack):
    with pytest.raises(StackFailed, match="HOLDFAST_DEPLOYMENT needs HOLDFAST_BUILD_ID"):
        await versioned.start_worker()


def test_unversioned_is_the_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HOLDFAST_DEPLOYMENT", raising=False)
    assert versioning(Settings()) == {"build_id": Settings().build_id}
    with pytest.raises(NotReady):
        versioning(Settings(deployment="ward"))


def test_what_counts_as_trouble():
    idle = Build("b1", "draining", open_runs=0, workers=1, backlog=0, waiting_s=0)
    assert not idle.trouble
    assert replace(idle, open_runs=2, workers=0).trouble
    assert replace(idle, backlog=1, waiting_s=9).trouble
    assert not replace(idle, backlog=1, waiting_s=0.1).trouble
    assert not replace(idle, workers=0).trouble
    assert "no build is current" in Deployment("ward", [idle]).troubles[0]
    assert Deployment("ward", [replace(idle, state="current")]).troubles == []
