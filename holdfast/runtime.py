"""What a worker process holds open: store, ledger, checkpoints, model client, HTTP client. Opened once, closed once."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path

import httpx2

from holdfast.mcp.hub import Hub
from holdfast.models import ModelClient
from holdfast.reliability.chain import Guards
from holdfast.reliability.ledger import Ledger
from holdfast.reliability.waiting import NoAddress
from holdfast.settings import Settings
from holdfast.state.database import Database, open_database
from holdfast.state.version import check_schema


@dataclass(frozen=True)
class Runtime:
    settings: Settings
    db: Database
    guards: Guards
    models: tuple[ModelClient, ...]
    """The first one is asked; the others stand in, in this order."""
    http: httpx2.AsyncClient
    mcp: Hub = field(default_factory=Hub)

    @property
    def ledger(self) -> Ledger:
        return self.guards.ledger

    def service_url(self, service: str) -> str:
        """Base address of a service. Raises NoAddress for one that has no setting: the call waits until it has."""
        if address := {"hospital": self.settings.hospital_url, **self.settings.services}.get(service):
            return address
        setting = f'HOLDFAST_SERVICES=\'{{"{service}": "http://…"}}\''
        words = f"no address of service {service!r}: set {setting} for the workers (or `up`), and start them again"
        raise NoAddress(self.settings.park_s, words)

    def workspace(self, agent: str) -> Path:
        """The folder of an agent, made when missing."""
        folder = self.settings.home.resolve() / "workspace" / agent
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    async def close(self) -> None:
        await self.mcp.close()
        for model in self.models:
            await model.close()
        await self.http.aclose()
        await self.guards.close()
        await self.db.close()


async def open_runtime(settings: Settings) -> Runtime:
    """Raises StoreUnavailable or SchemaMismatch."""
    db = await open_database(settings.store_url, settings.store_timeout_s)
    try:
        await check_schema(db)
    except BaseException:
        await db.close()
        raise
    return Runtime(
        settings=settings,
        db=db,
        guards=Guards(db, worker=f"{socket.gethostname()}/{os.getpid()}"),
        models=tuple(ModelClient(settings, target) for target in settings.models),
        http=httpx2.AsyncClient(
            # None of its own: the chain puts the tool's own around each call. Connecting is another matter.
            timeout=httpx2.Timeout(None, connect=5.0),
            limits=httpx2.Limits(max_connections=500),
            # Takes no cookies: what a service sets for one call would be sent with another tenant's.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        ),
    )
