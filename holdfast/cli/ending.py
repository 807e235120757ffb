"""The one place where a process of ours ends."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Sends what is buffered and ends the process with exactly this status.

    Not `sys.exit`: while the interpreter shuts down, threads of the Temporal client's native part can still abort the
    process, and the status would then be theirs (temporalio/sdk-python issue 300).
    """
    if "holdfast.telemetry.tracing" in sys.modules:
        from holdfast.telemetry import tracing

        tracing.shutdown()
    if "holdfast.telemetry.metrics" in sys.modules:
        from holdfast.telemetry import metrics

        metrics.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has gone, or the disk is full: `main` has said so if it could
            if stream is not None:
                stream.flush()
    os._exit(code)
