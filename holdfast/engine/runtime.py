"""The resources of a worker process: store, protections, model clients, HTTP client. Opened and closed once."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path

import httpx2

from holdfast.ext.mcp.hub import Hub
from holdfast.reasoning.model_client import ModelClient
from holdfast.reliability.chain import Guards
from holdfast.reliability.ledger import Ledger
from holdfast.reliability.waiting import NoAddress
from holdfast.settings import Settings
from holdfast.state.database import Database
from holdfast.state.opening import open_database
from holdfast.state.version import check_schema


@dataclass(frozen=True)
class Runtime:
    settings: Settings
    db: Database
    guards: Guards
    models: tuple[ModelClient, ...]
    """The first model is called; the others are its fallbacks, in this order."""
    http: httpx2.AsyncClient
    mcp: Hub = field(default_factory=Hub)

    @property
    def ledger(self) -> Ledger:
        return self.guards.ledger

    def service_url(self, service: str) -> str:
        """Returns the base address of a service. Raises NoAddress without one: the call waits until it is set."""
        if address := {"hospital": self.settings.hospital_url, **self.settings.services}.get(service):
            return address
        setting = f'HOLDFAST_SERVICES=\'{{"{service}": "http://…"}}\''
        words = f"no address of service {service!r}: set {setting} for the workers (or `up`), and restart them"
        raise NoAddress(self.settings.park_s, words)

    def workspace(self, agent: str) -> Path:
        """Returns the folder of an agent, and creates it if it is missing."""
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
    """Opens the resources. Raises StoreUnavailable or SchemaMismatch."""
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
            # No timeout except for connecting: the chain bounds each call with the tool's own timeout.
            timeout=httpx2.Timeout(None, connect=5.0),
            limits=httpx2.Limits(max_connections=500),
            # Accepts no cookies: a cookie that a service sets for one call would go out with another tenant's call.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        ),
    )
