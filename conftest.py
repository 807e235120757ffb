import os
import sys
from typing import Any

import pytest
from hypothesis import settings

# Some images forbid bytecode. A suite that starts a thousand Python processes would spend half its time compiling.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The suite looks for surprises a little at each run; `--hypothesis-profile=long` does so for minutes.
settings.register_profile("short", max_examples=40, deadline=None)
settings.register_profile("long", max_examples=1000, deadline=None)
settings.load_profile("short")

pytest_plugins = [
    "holdfast.testing",
    "tests.fixtures.store",
    "tests.fixtures.temporal",
    "tests.fixtures.stack",
    "tests.fixtures.checkout",
    "tests.fixtures.ward",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--uncached",
        action="store_true",
        help="the workers of a stage keep no run in their cache: each workflow task replays its run from the history",
    )


@pytest.fixture
def worker_options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """With `--uncached` every workflow task replays its run: what holds only in a cached run fails at once."""
    return {"max_cached_workflows": 0} if request.config.getoption("--uncached") else {}
