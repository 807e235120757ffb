"""Worker processes that a test kills."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from holdfast.dev.stack import Child, without_ours
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage


@asynccontextmanager
async def workers(stage: Stage, home: Path, module: str) -> AsyncIterator[dict[int, Child]]:
    """Two worker processes, by process id. Both, because whichever has not got the work has had its start by then."""
    settings = stage.runtime.settings
    environment = {
        **without_ours(os.environ),
        "HOLDFAST_HOME": str(home),
        "TEMPORAL_ADDRESS": stage.client.service_client.config.target_host,
        "HOLDFAST_TASK_QUEUE": stage.queue,
        "DATABASE_URL": settings.store_url,
        "OPENAI_BASE_URL": settings.openai_base_url,
        "OPENAI_API_KEY": "test",
    }
    command = [sys.executable, "-m", f"tests.integration.activities.{module}"]
    both = [Child(f"worker {n}", command, environment, home / f"worker-{n}.log") for n in range(2)]
    try:
        for each in both:
            each.start()
        yield {each.pid: each for each in both}
    finally:
        for each in both:
            each.signal(signal.SIGKILL)
            each.wait(PATIENCE_S)
