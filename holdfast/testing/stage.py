"""A real Temporal server for each test process, and workers in the test's own loop."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.service import RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from holdfast.authoring.agent import AgentSpec
from holdfast.contracts.run import AgentInput, RunResult, RunStatus
from holdfast.dev.stack import temporal_cli
from holdfast.engine.client import DATA_CONVERTER, SEARCH_ATTRIBUTES
from holdfast.engine.runtime import Runtime, open_runtime
from holdfast.settings import Settings
from holdfast.state.runs import Runs
from holdfast.state.schema import migrate
from holdfast.testing.model import FakeModel
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.replay import ids_on, replay_all
from workflows.agent import AgentWorkflow
from workflows.serving import make_worker

DYNAMIC_CONFIG = {
    "history.timerProcessorMaxTimeShift": '"10ms"',
    "history.continueAsNewMinInterval": '"0s"',  # by default a second passes between two executions
    # The failure of a workflow task at which the server reports the run: the fifth by default, some 25 s later.
    "system.numConsecutiveWorkflowTaskProblemsToTriggerSearchAttribute": "2",
}
"""What a server of the tests does sooner than one with its defaults."""


async def dev_server(more: Mapping[str, str] | None = None, **options: Any) -> WorkflowEnvironment:
    """A server of one's own with our search attributes.

    more: dynamic config beside `DYNAMIC_CONFIG`. `options` are `WorkflowEnvironment.start_local`'s.
    """
    config = [f"{key}={value}" for key, value in {**DYNAMIC_CONFIG, **(more or {})}.items()]
    return await WorkflowEnvironment.start_local(
        dev_server_existing_path=temporal_cli(),
        dev_server_startup_timeout=timedelta(seconds=PATIENCE_S),
        search_attributes=list(SEARCH_ATTRIBUTES),
        dev_server_log_level="error",
        dev_server_extra_args=[word for each in config for word in ("--dynamic-config-value", each)],
        **options,
    )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def temporal() -> AsyncIterator[WorkflowEnvironment]:
    """The dev server, shared by the tests of one process."""
    async with await dev_server(data_converter=DATA_CONVERTER) as env:
        yield env


@dataclass
class Stage:
    """One test's own task queue, store and model."""

    client: Client
    runtime: Runtime
    model: FakeModel
    queue: str = field(default_factory=lambda: f"q-{uuid.uuid4().hex[:8]}")
    started: list[str] = field(default_factory=list)
    """Workflow ids."""
    task_timeout: timedelta = timedelta(seconds=5)
    """Of the workflow tasks of its runs. The SDK answers the first failure of a task; the next ones time out."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of all workers of this stage, unless a test says otherwise."""
    broken: set[str] = field(default_factory=set)
    """Run ids of executions that a test has made so that they do not replay."""

    @asynccontextmanager
    async def worker(
        self, *, workflows_only: bool = False, activities_only: bool = False, **options: Any
    ) -> AsyncIterator[Worker]:
        if activities_only:
            options["workflows"] = []
        if workflows_only:
            options["activities"] = []
        worker = make_worker(self.client, self.queue, self.runtime, **{**self.options, **options})
        async with worker:
            yield worker

    async def stored(self, handle: WorkflowHandle[Any, Any]) -> RunResult:
        """The result that the store has of a run, which says the same as its `outcome` column."""
        row = await Runs(self.runtime.db).by_workflow(handle.id)
        assert row is not None, f"the store knows nothing of {handle.id}"
        assert row.result is not None
        result = RunResult.model_validate_json(row.result)
        assert row.outcome == result.outcome
        return result

    def workspace(self, spec: AgentSpec) -> Path:
        """The agent's folder."""
        return self.runtime.workspace(spec.name)

    async def start(
        self, spec: AgentSpec, value: dict[str, Any] | None = None, **more: Any
    ) -> WorkflowHandle[Any, RunResult]:
        self.started.append(f"{spec.name}-{uuid.uuid4().hex[:8]}")
        return await self.client.start_workflow(
            AgentWorkflow.run,
            AgentInput(agent=spec.name, input=value or {}, **more),
            id=self.started[-1],
            task_queue=self.queue,
            task_timeout=self.task_timeout,
        )

    async def replays(self) -> None:
        """Fails when the history of a run on this stage's queue does not replay."""
        try:
            listed = await ids_on(self.client, f'TaskQueue = "{self.queue}"')
        except RPCError as error:
            if error.status is not RPCStatusCode.UNIMPLEMENTED:  # the server that skips time has no visibility
                raise
            listed = []
        failed = await replay_all(self.client, dict.fromkeys([*self.started, *listed]))
        failed = [each for each in failed if each.run_id not in self.broken]
        assert not failed, "runs that do not replay:\n" + "\n".join(map(str, failed))


async def status(handle: WorkflowHandle[Any, Any]) -> RunStatus:
    """A worker answers; one that gets no time to do so in 10 s is asked again."""
    while True:
        try:
            return await handle.query("status", result_type=RunStatus)
        except RPCError as error:
            if error.status not in (RPCStatusCode.CANCELLED, RPCStatusCode.DEADLINE_EXCEEDED):
                raise


async def until(handle: WorkflowHandle[Any, Any], holds: Callable[[RunStatus], bool]) -> RunStatus:
    """Waits until the run's status is as wanted."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds(now := await status(handle)):
            await asyncio.sleep(0.02)
        return now


async def at_rest(handle: WorkflowHandle[Any, Any]) -> None:
    """Waits until no activity of the run is open."""
    while (await handle.describe()).raw_description.pending_activities:
        await asyncio.sleep(0.02)


async def retried(handle: WorkflowHandle[Any, Any]) -> None:
    """Waits until an activity of the run is tried again."""
    async with asyncio.timeout(PATIENCE_S):
        while not any(each.attempt > 1 for each in (await handle.describe()).raw_description.pending_activities):
            await asyncio.sleep(0.02)


async def failure(handle: WorkflowHandle[Any, Any]) -> RunResult:
    """The result in the details of a failed run."""
    with pytest.raises(WorkflowFailureError) as caught:
        await handle.result()
    cause = caught.value.cause
    assert isinstance(cause, ApplicationError), cause
    assert cause.type == "agent_failed", cause
    return RunResult.model_validate(cause.details[0])


async def cancelled(handle: WorkflowHandle[Any, Any]) -> None:
    """Waits for the end and checks that its Temporal status is Cancelled."""
    with pytest.raises(WorkflowFailureError) as caught:
        await handle.result()
    assert isinstance(caught.value.cause, CancelledError), caught.value.cause
    assert (await handle.describe()).status is WorkflowExecutionStatus.CANCELED


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file, to copy."""
    path = tmp_path_factory.mktemp("store") / "template.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """Address of a fresh migrated SQLite file."""
    return f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'holdfast.db')}"


@pytest.fixture
def worker_options() -> dict[str, Any]:
    """Temporal's options for the workers of all stages: override it to set some."""
    return {}


@pytest_asyncio.fixture
async def lite(temporal: WorkflowEnvironment, sqlite_url: str, worker_options: dict[str, Any]) -> AsyncIterator[Stage]:
    """A stage on SQLite only, for properties that do not depend on the store."""
    async with a_stage(temporal.client, sqlite_url) as one:
        one.options = worker_options
        yield one


@asynccontextmanager
async def a_stage(client: Client, store_url: str, **more: Any) -> AsyncIterator[Stage]:
    """more: settings. At its end, every run that was made on it has to replay."""
    async with a_runtime(store_url, **more) as (runtime, model):
        stage = Stage(client, runtime, model)
        yield stage
        await stage.replays()


@asynccontextmanager
async def a_runtime(store_url: str, **more: Any) -> AsyncIterator[tuple[Runtime, FakeModel]]:
    """What a worker process holds open, with a model of its own. more: settings."""
    async with FakeModel.serve() as model:
        home = tempfile.TemporaryDirectory(prefix="holdfast-")
        runtime = await open_runtime(
            Settings(
                home=Path(home.name),
                database_url=store_url,
                openai_base_url=model.url,
                openai_api_key=SecretStr("test"),
                model="fake-1",
                park_s=0.3,
                **more,
            )
        )
        try:
            yield runtime, model
        finally:
            await runtime.close()
            home.cleanup()
