"""Counters, as a collector receives them over HTTP from a process that ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from holdfast.dev.stack import ROOT, without_ours

COUNTING = """
import sys
from holdfast.cli.ending import end_process
from holdfast.telemetry import metrics

metrics.breaker_changed("pharmacy", "opened")
metrics.waited("breaker")
metrics.waited("breaker")
metrics.waited("rate limit")
metrics.fallback("model", "gpt-5-nano")
metrics.dead_letter("run")
end_process(70 if "opentelemetry" in sys.modules else 7)
"""


class Collector:
    """A small OTLP/HTTP collector. `counted`: name and attributes of each counter, with its value."""

    def __init__(self) -> None:
        self.counted: Counter[tuple[str, tuple[str, ...]]] = Counter()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/metrics":
                    collector.take(ExportMetricsServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, request: ExportMetricsServiceRequest) -> None:
        metrics = (
            m for resource in request.resource_metrics for scope in resource.scope_metrics for m in scope.metrics
        )
        for metric in metrics:
            for point in metric.sum.data_points:
                attributes = tuple(sorted(f"{each.key}={each.value.string_value}" for each in point.attributes))
                self.counted[metric.name, attributes] += point.as_int

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def count(endpoint: str) -> subprocess.CompletedProcess[str]:
    environment = {**without_ours(os.environ), "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    return subprocess.run(
        [sys.executable, "-c", COUNTING], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


def test_what_a_process_counted_is_sent_before_it_ends(collector: Collector) -> None:
    done = count(collector.url)
    assert (done.returncode, done.stdout, done.stderr) == (70, "", "")
    assert collector.counted == {
        ("holdfast.breaker.changes", ("change=opened", "target=pharmacy")): 1,
        ("holdfast.waits", ("reason=breaker",)): 2,
        ("holdfast.waits", ("reason=rate limit",)): 1,
        ("holdfast.fallbacks", ("by=gpt-5-nano", "of=model")): 1,
        ("holdfast.dead_letters", ("kind=run",)): 1,
    }


def test_without_a_collector_nothing_of_opentelemetry_is_loaded() -> None:
    assert count("").returncode == 7
