"""`docker-compose.yml` read against the code: what it sets exists, what it runs exists, what it needs is waited for.

No engine runs here: that the images start is not shown by these tests (see docs/how-to/deployment.md).
"""

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from activities import activities
from holdfast.authoring import registry
from holdfast.engine.client import sandbox
from holdfast.settings import Settings
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage
from tests.fixtures.temporal import binary
from workflows.agent import AgentWorkflow

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
ONE_SHOT = {"temporal-schema", "temporal-namespace", "migration"}
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)")


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(s|m)", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(number) * {"s": 1, "m": 60}[unit]


def command(service: dict[str, Any]) -> list[str]:
    """What the container runs; the Dockerfile's command when the service names none."""
    return service.get("command", ["python", "worker.py"])


def test_every_variable_of_ours_is_a_setting_or_temporals_own():
    known = {str(field.alias) for field in Settings.model_fields.values() if field.alias}
    for name, service in OURS.items():
        for variable in service.get("environment", {}):
            assert variable in known or variable in ("TEMPORAL_ADDRESS", "TEMPORAL_NAMESPACE"), f"{name}: {variable}"


def test_every_setting_reaches_the_workers():
    elsewhere = {"HOLDFAST_TEMPORAL_CLI", "HOLDFAST_CODEC_TOKEN", "HOLDFAST_MCP_TOKEN"}  # no worker reads them
    settings = {str(field.alias) for field in Settings.model_fields.values() if field.alias}
    for name, service in OURS.items():
        if "worker.py" in command(service):
            assert settings - elsewhere == settings & set(service["environment"]), name


def test_the_values_are_ones_that_the_settings_take(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.startswith(("HOLDFAST_", "OPENAI_", "OTEL_", "DATABASE_URL")):
            monkeypatch.delenv(name)
    for variable, value in SERVICES["worker"]["environment"].items():
        if value is None:  # passed on from the shell, where it is not set
            continue
        monkeypatch.setenv(variable, re.sub(r"\$\{\w+(?::[-?](.*?))?\}", r"\1", value))
    settings = Settings()
    assert settings.database_url.startswith("postgresql://")
    assert settings.openai_base_url == Settings.model_fields["openai_base_url"].default
    assert settings.model == Settings.model_fields["model"].default


def test_the_file_fits_the_compose_specification():
    schema = json.loads((Path(__file__).parent / "schemas/compose-spec.json").read_text())
    jsonschema.validate(COMPOSE, schema)


def test_every_task_queue_has_a_service_that_serves_it():
    served = [command(service)[-1] for service in OURS.values() if command(service)[1:3] == ["worker.py", "--queue"]]
    assert sorted(served) == sorted(["main", *registry.stages()])


def test_the_collector_takes_what_workers_send():
    config = yaml.safe_load(COMPOSE["configs"]["collector"]["content"])
    sent = re.sub(r"\$\{\w+:-(.*)\}", r"\1", SERVICES["worker"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"])
    assert sent == "http://collector:" + config["receivers"]["otlp"]["protocols"]["http"]["endpoint"].split(":")[1]
    for pipeline in config["service"]["pipelines"].values():
        for part, names in pipeline.items():
            assert set(names) <= set(config[part])


def test_every_image_is_pinned_to_an_exact_version():
    images = [service["image"] for service in SERVICES.values()]
    base = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for image in images + base:
        assert re.search(r":\d+\.\d+(\.\d+)?(-[\w.-]+)?$", image), f"{image} is not pinned"


def test_the_server_is_the_version_that_is_tested():
    said = subprocess.run([binary("temporal"), "--version"], capture_output=True, text=True, check=True).stdout
    server, ui = re.search(r"Server ([\d.]+), UI ([\d.]+)", said).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert SERVICES["temporal"]["image"] == f"temporalio/server:{server}"
    assert SERVICES["temporal-schema"]["image"] == f"temporalio/admin-tools:{server}"
    assert SERVICES["temporal-ui"]["image"] == f"temporalio/ui:{ui}"


def test_what_stays_up_has_a_health_check_and_the_rest_ends():
    for name, service in SERVICES.items():
        if name in ONE_SHOT:
            assert service["restart"].startswith("on-failure"), name
        else:
            assert "healthcheck" in service, name
            assert service["restart"] == "unless-stopped", name


def test_everybody_waits_for_what_they_need_to_be_ready():
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if needed in ONE_SHOT else "service_healthy"
            assert how["condition"] == wanted, f"{name} → {needed}"
    assert "migration" in SERVICES["worker"]["depends_on"]


@pytest.mark.parametrize("name", OURS)
def test_commands_exist(name: str):
    argv = command(OURS[name])
    lines = [shlex.split(argv[2])] if argv[:2] == ["sh", "-c"] else [argv]
    for words in lines:
        for start in (i for i, word in enumerate(words) if word == "python"):
            call = words[start + 1 :]
            end = next((i for i, word in enumerate(call) if word in ("&&", "||", ";")), len(call))
            program = call[:2] if call[0] == "-m" else call[: 2 if call[0] == "starter.py" else 1]
            flags = [word.split("=")[0] for word in call[:end] if word.startswith("--")]
            shown = subprocess.run(
                [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, env=_plain()
            )
            assert shown.returncode == 0, shown.stderr
            assert all(flag in shown.stdout for flag in flags), f"{call}: not all of {flags} are options"


def test_the_image_holds_what_the_commands_need():
    dockerfile, ignored = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().split()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE) for word in line.split()]
    for path in copied:
        assert (ROOT / path).exists(), path
        assert f"!{path}" in ignored, f".dockerignore keeps {path} out"
    assert {"worker.py", "starter.py", "holdfast", "workflows", "activities", "agents"} <= set(copied)
    assert "--require-hashes" in dockerfile
    assert re.search(r"^USER (?!root)\w+", dockerfile, re.MULTILINE)


def test_the_drain_is_shorter_than_the_time_until_the_kill():
    worker = SERVICES["worker"]
    # `worker.py` allows itself two seconds beyond the drain before it gives up.
    assert seconds(worker["stop_grace_period"]) > float(worker["environment"]["HOLDFAST_DRAIN_S"]) + 2


def test_addresses_name_services_and_ports_that_are_there():
    environment = SERVICES["worker"]["environment"]
    assert environment["TEMPORAL_ADDRESS"] == "temporal:7233"
    assert "@postgres:5432/holdfast" in environment["DATABASE_URL"]
    assert environment["HOLDFAST_HOSPITAL_URL"] == "http://hospital:8090"
    assert "--port=8090" in command(SERVICES["hospital"])
    assert "--port=8091" in command(SERVICES["model"])
    assert environment["HOLDFAST_UI_URL"].endswith(SERVICES["temporal-ui"]["ports"][0].split(":")[1])
    for service in SERVICES.values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{port} is open to the network"


def test_volumes_and_configs_are_declared():
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"], f"{name}: {volume}"
        for config in service.get("configs", []):
            assert config["source"] in COMPOSE["configs"], f"{name}: {config}"


def test_no_secret_is_written_down():
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|PWD|KEY|SECRET", variable):
                assert value is None or VARIABLE.search(value), f"{name}: {variable} is literal"
    password = re.search(r"://holdfast:(.*)@", SERVICES["worker"]["environment"]["DATABASE_URL"])
    assert password is not None
    assert password.group(1).startswith("${HOLDFAST_DB_PASSWORD:?"), "a missing password has to be an error"


def test_the_scripted_model_only_comes_when_asked_for():
    assert SERVICES["model"]["profiles"] == ["scripted"]
    assert not any("model" in service.get("depends_on", {}) for service in SERVICES.values())


async def test_the_workers_health_check_tells_a_worker_that_polls(temporal: WorkflowEnvironment, lite: Stage):
    """The check itself, as the container's shell would run it, against a real server."""
    check = SERVICES["worker"]["healthcheck"]["test"]
    assert check[0] == "CMD-SHELL"
    line = check[1].replace("$$", "$")

    def healthy(host: str) -> bool:
        address = temporal.client.service_client.config.target_host
        where = {"TEMPORAL_ADDRESS": address, "HOLDFAST_TASK_QUEUE": lite.queue, "HOSTNAME": host}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(["sh", "-c", line], env={**_plain(), **where, "PATH": path}).returncode == 0

    client = await Client.connect(temporal.client.service_client.config.target_host, identity="1@this-container")
    assert not healthy("this-container")
    serves: dict[str, Any] = {"workflows": [AgentWorkflow], "activities": activities(lite.runtime, [AgentWorkflow])}
    async with Worker(client, task_queue=lite.queue, workflow_runner=sandbox(), **serves):
        await _polled(temporal.client, lite.queue)
        async with asyncio.timeout(PATIENCE_S):  # the server's answer to the command is some seconds old
            while not await asyncio.to_thread(healthy, "this-container"):
                await asyncio.sleep(0.2)
        assert not healthy("another-container")


async def _polled(client: Client, queue: str) -> None:
    """Waits until the server has seen a poller of the queue."""
    request = DescribeTaskQueueRequest(
        namespace="default", task_queue=TaskQueue(name=queue), task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW
    )
    async with asyncio.timeout(PATIENCE_S):
        while not (await client.workflow_service.describe_task_queue(request)).pollers:
            await asyncio.sleep(0.05)


def _plain() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("TEMPORAL_", "HOLDFAST_"))}
