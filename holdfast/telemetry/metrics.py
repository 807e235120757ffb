"""OpenTelemetry counters of the protections. On when `OTEL_EXPORTER_OTLP_ENDPOINT` is set, else no-ops.

holdfast.breaker.changes   by target and change (opened, closed, reopened)
holdfast.waits             by reason (rate limit, breaker, address, outcome)
holdfast.fallbacks         by what was replaced, and what replaced it
holdfast.dead_letters      by kind (call, undo, run, hook)
"""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING

from holdfast.settings import settings
from holdfast.telemetry.tracing import FLUSH_S

if TYPE_CHECKING:
    from opentelemetry.metrics import Counter
    from opentelemetry.sdk.metrics import MeterProvider


@cache
def _provider() -> MeterProvider | None:
    if not settings().otlp_endpoint:
        return None
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource

    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    return MeterProvider([reader], resource=Resource.create({"service.name": "holdfast"}))


def breaker_changed(target: str, change: str) -> None:
    _count("holdfast.breaker.changes", target=target, change=change)


def waited(reason: str) -> None:
    _count("holdfast.waits", reason=reason)


def fallback(of: str, by: str) -> None:
    _count("holdfast.fallbacks", of=of, by=by)


def dead_letter(kind: str) -> None:
    _count("holdfast.dead_letters", kind=kind)


def shutdown() -> None:
    """Sends the counts since the last export, for a process about to end by `os._exit`. Takes at most `FLUSH_S`."""
    if _provider.cache_info().currsize and (provider := _provider()) is not None:
        flushing = threading.Thread(target=provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(FLUSH_S)


def _count(name: str, **attributes: str) -> None:
    if (counter := _counter(name)) is not None:
        counter.add(1, attributes)


@cache
def _counter(name: str) -> Counter | None:
    provider = _provider()
    return None if provider is None else provider.get_meter("holdfast").create_counter(name)
