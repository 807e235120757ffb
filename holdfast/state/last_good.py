"""The last good result of a read, for use while its service is unavailable."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from holdfast.state.clock import StoreClock
from holdfast.state.database import Database

_KEEP = """
INSERT INTO last_good (tool, tenant, digest, result, at) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (tool, tenant, digest) DO UPDATE SET result = excluded.result, at = excluded.at"""


class Kept(NamedTuple):
    result: Any
    seconds: float

    @property
    def age(self) -> str:
        """The age for display: '3 h', '12 min', '40 s'."""
        for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
            if self.seconds >= size:
                return f"{self.seconds / size:.0f} {unit}"
        return f"{self.seconds:.0f} s"


class LastGoodResults:
    """The last good results, by tool, tenant and digest of the arguments."""

    def __init__(self, db: Database, clock: StoreClock) -> None:
        self._db = db
        self._clock = clock

    async def keep(self, tool: str, tenant: str, digest: str, result: Any) -> None:
        await self._db.run(_KEEP, tool, tenant, digest, json.dumps(result), await self._clock.now())

    async def get(self, tool: str, tenant: str, digest: str, max_age_s: float) -> Kept | None:
        """Returns the result, or None if there is none or it is older than `max_age_s`."""
        sql = "SELECT result, at FROM last_good WHERE tool = ? AND tenant = ? AND digest = ?"
        row = await self._db.one(sql, tool, tenant, digest)
        if row is None:
            return None
        age = max(await self._clock.now() - row[1], 0.0)
        return Kept(json.loads(row[0]), age) if age <= max_age_s else None
