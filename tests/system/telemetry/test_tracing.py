"""Traces, as a collector receives them over HTTP from the processes of a run."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from holdfast.contracts.run import RunStatus
from holdfast.dev.stack import ROOT, Stack, without_ours
from holdfast.testing.patience import PATIENCE_S
from tests.fixtures.stack import Cli, replays, until

KEY = "sk-not-for-traces"


class Collector:
    """A small OTLP/HTTP collector. `raw`: everything that was sent; `spans`: the traces of it, decoded."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.raw: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.raw.append(body)
                if self.path == "/v1/traces":
                    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                        for scope in resource.scope_spans:
                            collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def trace(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans if span.trace_id.hex() == trace_id]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def traced(tmp_path: Path, collector: Collector) -> Iterator[Stack]:
    """A stack whose worker sends traces, with an API key of its own."""
    base = {**without_ours(os.environ), "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    stack = Stack(tmp_path / "stack", base, durable=False)
    stack.environment["OPENAI_API_KEY"] = KEY
    try:
        for child in stack.services:
            child.environment["OPENAI_API_KEY"] = KEY
        asyncio.run(stack.start())
        yield stack
        asyncio.run(replays(stack))
    finally:
        stack.stop(grace_s=0)


def status_of(cli: Cli, run: str) -> RunStatus:
    return RunStatus.model_validate(json.loads(cli("status", run, "--json").stdout)["status"])


def test_a_run_is_one_trace_also_over_a_worker_that_is_replaced(traced: Stack, collector: Collector):
    cli = Cli(traced.environment)
    httpx2.put(
        f"{traced.hospital_url}/faults/insurance", json={"mode": "fail", "times": 1, "status": 503}, timeout=PATIENCE_S
    )
    started = cli("run", "discharge", "--input", '{"patient_id": "pat-1"}', "--json")
    assert started.returncode == 0, started.stderr
    run = json.loads(started.stdout)["workflow_id"]
    until(lambda: len(status_of(cli, run).approvals) == 2)
    trace_id = status_of(cli, run).trace_id
    assert trace_id

    # The second worker replays the run and goes on in its trace; the first one's spans are sent as it ends.
    traced.workers[0].signal(signal.SIGTERM)
    assert traced.workers[0].wait(PATIENCE_S)
    assert traced.workers[0].exit_code == 0, traced.workers[0].output()
    asyncio.run(traced.start_worker())
    assert cli("approve", run, "--by", "dr.lee").returncode == 0
    assert cli("follow", run).returncode == 0
    traced.workers[1].signal(signal.SIGTERM)
    assert traced.workers[1].wait(PATIENCE_S)

    spans = collector.trace(trace_id)
    names = [span.name for span in spans]
    assert names.count("start run") == 1
    assert names.count("StartWorkflow:AgentWorkflow") == 1
    assert names.count("RunWorkflow:AgentWorkflow") == 1, names
    assert "plan turn 1" in names
    assert any(name.startswith("chat ") for name in names)
    assert names.count("tool read_record") == 1
    assert names.count("tool notify_patient") == 1, "the second worker's spans are not in the trace"
    assert not any("Query" in span.name for span in collector.spans), "looking at a run is sent"

    # Nothing hangs in the air: every span's parent is in the trace, up to the starter's.
    ids = {span.span_id for span in spans}
    roots = [span.name for span in spans if span.parent_span_id not in ids]
    assert roots == ["start run"], roots
    chain = _ancestors(spans, next(span for span in spans if span.name == "tool read_record"))
    assert chain[-3:] == ["RunWorkflow:AgentWorkflow", "StartWorkflow:AgentWorkflow", "start run"]
    asked = next(span for span in spans if span.name.startswith("chat "))
    assert _ancestors(spans, asked)[1].startswith("plan turn")
    usage = {each.key: each.value for each in asked.attributes}
    assert usage["gen_ai.usage.input_tokens"].int_value > 0

    # A failure is marked as one, and what was said of it stays here.
    failed = [span.name for span in spans if span.status.code == Status.STATUS_CODE_ERROR]
    assert "tool verify_insurance" in failed
    assert not any(span.events or span.status.message for span in spans)

    # The key, and what the record says of the patient: name, birth date, diagnosis, phone.
    sent = b"".join(collector.raw)
    secrets = [KEY, *_facts(traced)]
    assert not [text for text in secrets if text.encode() in sent]


CONTINUED = """
import asyncio
from workflows.serving import make_worker
from workflows.serving import make_worker
from holdfast.engine.runtime import open_runtime
from holdfast.settings import settings
from holdfast.engine.starting import start_run
from holdfast.state.runs import Runs
from holdfast.telemetry import tracing
from holdfast.engine.client import connect
from holdfast.testing.model import FakeModel, call, say, sequence
from tests.fixtures.world import World, agent

async def main():
    client, world = await connect(), World()
    spec = agent(world.tool("one"), world.tool("two"), turns_per_execution=1)
    async with FakeModel.serve() as model:
        model.script = sequence(call(("one", {})), call(("two", {})), say("done"))
        runtime = await open_runtime(settings().model_copy(update={"openai_base_url": model.url}))
        async with make_worker(client, "continued", runtime):
            started = await start_run(client, Runs(runtime.db), spec.name, {}, task_queue="continued")
            await client.get_workflow_handle(started.workflow_id).result()
        await runtime.close()
    print(started.trace_id)
    tracing.shutdown()

asyncio.run(main())
"""


def test_continue_as_new_stays_in_the_trace(stack: Stack, collector: Collector):
    done = _python(CONTINUED, stack.home, **stack.environment, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    assert done.returncode == 0, done.stderr
    names = [span.name for span in collector.trace(done.stdout.strip())]
    assert names.count("RunWorkflow:AgentWorkflow") == 3
    assert [f"tool {name}" in names for name in ("one", "two")] == [True, True]
    assert len(names) == len(collector.spans), "a part of the run is in a trace of its own"


PROBE = """
import asyncio, sys
{imports}
from holdfast.telemetry import tracing
assert tracing.temporal_plugins() == []
with tracing.span("x") as current:
    assert current is None and tracing.trace_id() == ""
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""


ENDING = """
import os, time
from holdfast.cli.ending import end_process
from holdfast.telemetry import tracing
with tracing.span("x"):
    pass
began, leave = time.monotonic(), os._exit
def timed(code):
    os.write(1, str(time.monotonic() - began - tracing.FLUSH_S).encode())
    leave(code)
os._exit = timed
end_process(7)
"""


@pytest.mark.parametrize(
    "imports", ["import worker", "import holdfast.cli.app, holdfast.cli.runs, holdfast.engine.starting"]
)
def test_off_it_costs_nothing_not_even_an_import(imports: str, tmp_path: Path):
    done = _python(PROBE.format(imports=imports), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_collector_that_is_gone_does_not_hold_up_the_end_of_a_process(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = f"http://127.0.0.1:{listener.getsockname()[1]}"
    done = _python(ENDING, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=gone)
    assert done.returncode == 7, done.stderr
    assert float(done.stdout) < 5


def _python(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**base, **environment, "HOLDFAST_HOME": str(home)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def _ancestors(spans: list[Span], span: Span) -> list[str]:
    """Names from a span up to its trace's root."""
    by_id = {each.span_id: each for each in spans}
    names = [span.name]
    while span.parent_span_id in by_id:
        span = by_id[span.parent_span_id]
        names.append(span.name)
    return names


def _facts(stack: Stack) -> list[str]:
    record = json.loads((ROOT / "holdfast/dev/simulation/patients/pat-1.json").read_text())
    found: list[str] = []

    def collect(value: object, name: str = "") -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(inner, key)
        elif isinstance(value, list):
            for inner in value:
                collect(inner, name)
        elif name in ("family", "birthDate", "text", "value", "line", "display") and len(str(value)) > 4:
            found.append(str(value))

    collect(record)
    assert len(found) >= 5, found
    return found
