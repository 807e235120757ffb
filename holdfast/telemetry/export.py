"""Trace export that sends structure, names, keys, times and counts, but never the text of an exception."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import Status

QUERY_SPANS = ("QueryWorkflow:", "HandleQuery:")
"""Name prefixes of query spans, which are not exported: `follow` queries a run several times a second."""


class DiscreetExporter(OTLPSpanExporter):
    """Exports spans without their events and status text, and no query spans.

    OpenTelemetry records exceptions as events, with message and stack, and in the status. Services and models write
    those messages, so private data, for example about a patient, could reach readers of traces.
    """

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return super().export([_without_text(span) for span in spans if not span.name.startswith(QUERY_SPANS)])


def _without_text(span: ReadableSpan) -> ReadableSpan:
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=span.attributes,
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
