"""The ground that the sweep's tests stand on, once a test process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
import pytest_asyncio

from tests.fixtures.store import TEMPLATE, PostgresForTests
from tests.sweep.environment import Ground, Lane


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def ground(tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresForTests) -> AsyncIterator[Ground]:
    home = tmp_path_factory.mktemp("sweep")
    name = f"sweep_{uuid4().hex[:12]}"
    urls = {"sqlite": f"sqlite:///{home / 'store.db'}", "postgresql": postgres_server.create(name, TEMPLATE)}
    async with Ground.open(home, urls) as ground:
        yield ground
    postgres_server.drop(name)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def lane(ground: Ground) -> Lane:
    return await ground.lane()
