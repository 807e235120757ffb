"""OpenTelemetry traces: one trace from the starter through workflow, activity, model call and tool call.

On when `OTEL_EXPORTER_OTLP_ENDPOINT` is set. When off, nothing of the SDK is imported and a span is a shared no-op.
A run is one trace, also across retries, restarted workers and continue-as-new. Spans that a killed worker had not
yet sent are lost.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from holdfast.settings import settings

if TYPE_CHECKING:
    from temporalio.contrib.opentelemetry import OpenTelemetryPlugin, ReplaySafeTracerProvider

FLUSH_S = 2.0
"""Seconds that the end of a process may wait for the collector."""


@cache
def _provider() -> ReplaySafeTracerProvider | None:
    if not settings().otlp_endpoint:
        return None
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from temporalio.contrib.opentelemetry import create_tracer_provider

    from holdfast.telemetry.export import DiscreetExporter

    provider = create_tracer_provider(resource=Resource.create({"service.name": "holdfast"}))
    provider.add_span_processor(BatchSpanProcessor(DiscreetExporter()))
    trace.set_tracer_provider(provider)
    return provider


def temporal_plugins() -> list[OpenTelemetryPlugin]:
    """Returns the client plugin that propagates the trace through Temporal; empty when tracing is off."""
    if _provider() is None:
        return []
    from temporalio.contrib.opentelemetry import OpenTelemetryPlugin

    return [OpenTelemetryPlugin(add_temporal_spans=True)]


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[Any]:
    """Opens a span around the block; yields None when tracing is off. Never put prompts or secrets in attributes."""
    provider = _provider()
    if provider is None:
        yield None
        return
    with provider.get_tracer("holdfast").start_as_current_span(name, attributes=attributes) as current:
        yield current


def trace_id() -> str:
    """Returns the current trace id as 32 hex digits; empty when tracing is off."""
    if _provider() is None:
        return ""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


def shutdown() -> None:
    """Sends the buffered spans, for a process that is about to end by `os._exit`. Takes at most `FLUSH_S`."""
    if not _provider.cache_info().currsize:  # never used, perhaps because the settings cannot be loaded
        return
    provider = _provider()
    if provider is not None:
        # In a thread: the exporter retries for ten seconds, and a missing collector must not delay the exit.
        flushing = threading.Thread(target=provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(FLUSH_S)
