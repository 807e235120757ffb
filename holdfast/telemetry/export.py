"""What leaves the process of a trace: structure, names, keys, times and counts; never the words of an exception."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import Status

LOOKING = ("QueryWorkflow:", "HandleQuery:")
"""Spans of somebody looking at a run, which `follow` does several times a second."""


class DiscreetExporter(OTLPSpanExporter):
    """Sends spans without their events and the text of their status, and without those of mere looking.

    Exceptions are recorded as events, with message and stack, and in the status: services and models word them, and
    what they say of a patient would end up with whoever reads traces.
    """

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return super().export([_bare(span) for span in spans if not span.name.startswith(LOOKING)])


def _bare(span: ReadableSpan) -> ReadableSpan:
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
