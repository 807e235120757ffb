"""Fixtures and helpers for tests of agents: `pytest_plugins = ["holdfast.testing"]` in the root `conftest.py`.

The fixture `lite` is a stage: a real Temporal server, a store, a worker and a model whose answers the test writes. At
the end of a test every run that it made has to replay.
"""

from __future__ import annotations

try:
    import pytest_asyncio as _needed  # noqa: F401 - the product itself does not need it
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"holdfast.testing needs {missing.name}: `uv add --dev 'holdfast[testing]'` installs it", name=missing.name
    ) from None

from holdfast.application import claim

claim()  # a team's repository may have packages of these names on the path of its tests

from holdfast.testing.model import FakeModel, call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.replay import replay_all
from holdfast.testing.service import Asked, FakeService, served
from holdfast.testing.stage import (
    Stage,
    cancelled,
    failure,
    lite,
    sqlite_template,
    sqlite_url,
    status,
    temporal,
    until,
    worker_options,
)

__all__ = [
    "PATIENCE_S",
    "Asked",
    "FakeModel",
    "FakeService",
    "Stage",
    "call",
    "cancelled",
    "failure",
    "lite",
    "replay_all",
    "say",
    "sequence",
    "served",
    "sqlite_template",
    "sqlite_url",
    "status",
    "temporal",
    "until",
    "worker_options",
]
