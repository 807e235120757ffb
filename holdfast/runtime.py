"""What a worker process holds open: store, ledger, checkpoints, model client, HTTP client. Opened once, closed once."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import httpx2

from holdfast.models import ModelClient
from holdfast.reliability.ledger import Ledger
from holdfast.settings import Settings
from holdfast.state.database import Database, open_database
from holdfast.state.version import check_schema


@dataclass(frozen=True)
class Runtime:
    settings: Settings
    db: Database
    ledger: Ledger
    models: ModelClient
    http: httpx2.AsyncClient

    def service_url(self, service: str) -> str:
        """Base address of a service. Raises KeyError for one that has no setting."""
        return {"hospital": self.settings.hospital_url}[service]

    async def close(self) -> None:
        await self.models.close()
        await self.http.aclose()
        await self.db.close()


async def open_runtime(settings: Settings) -> Runtime:
    """Raises StoreUnavailable or SchemaMismatch."""
    db = await open_database(settings.store_url)
    try:
        await check_schema(db)
    except BaseException:
        await db.close()
        raise
    return Runtime(
        settings=settings,
        db=db,
        ledger=Ledger(db, worker=f"{socket.gethostname()}/{os.getpid()}"),
        models=ModelClient(settings),
        # No timeout of its own: the chain puts the tool's own around each call. Connecting is another matter.
        http=httpx2.AsyncClient(timeout=httpx2.Timeout(None, connect=5.0), limits=httpx2.Limits(max_connections=500)),
    )
