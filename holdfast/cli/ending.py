"""Ends the process; the only place that does."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Flushes all buffers and ends the process with exactly this status.

    Not `sys.exit`: while the interpreter shuts down, threads of the Temporal client's native code can abort the process
    and change its exit status (temporalio/sdk-python issue 300).
    """
    if "holdfast.telemetry.tracing" in sys.modules:
        from holdfast.telemetry import tracing

        tracing.shutdown()
    if "holdfast.telemetry.metrics" in sys.modules:
        from holdfast.telemetry import metrics

        metrics.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader is gone, or the disk is full: `main` reported it if it could
            if stream is not None:
                stream.flush()
    os._exit(code)
