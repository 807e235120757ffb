"""The servers of the tests of the sweep, started once a test process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
import pytest_asyncio

from bench.sweep.environment import Lane, Servers
from tests.fixtures.store import TEMPLATE, PostgresForTests


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def servers(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresForTests
) -> AsyncIterator[Servers]:
    home = tmp_path_factory.mktemp("sweep")
    name = f"sweep_{uuid4().hex[:12]}"
    urls = {"sqlite": f"sqlite:///{home / 'store.db'}", "postgresql": postgres_server.create(name, TEMPLATE)}
    async with Servers.open(home, urls) as servers:
        yield servers
    postgres_server.drop(name)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def lane(servers: Servers) -> Lane:
    return await servers.lane()
