"""What every test gets without asking."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdfast.authoring import registry


@pytest.fixture(autouse=True)
def _no_agents_left_behind() -> Iterator[None]:
    """Agents that a test adds to the registry end with it: what there is must not depend on the order of tests."""
    added = registry._added, registry._added_batches  # pyright: ignore[reportPrivateUsage]
    before = [dict(each) for each in added]
    yield
    for now, then in zip(added, before, strict=True):
        now.clear()
        now.update(then)
    registry.services.cache_clear()
