"""Payload storage in the store's table `claims`: one row per content, named by its SHA-256."""

from __future__ import annotations

from holdfast.state.clock import StoreClock
from holdfast.state.database import Database

# A payload that is stored again is still in use, so its age starts again.
_PUT = """
INSERT INTO claims (digest, namespace, payload, at) VALUES (?, ?, ?, ?)
ON CONFLICT (digest, namespace) DO UPDATE SET at = excluded.at"""


class StoredPayloads:
    def __init__(self, db: Database) -> None:
        self._db = db
        self._clock = StoreClock(db)

    async def put(self, digest: str, namespace: str, payload: bytes) -> None:
        """Stores a payload. Idempotent. namespace: the Temporal namespace whose runs refer to the payload.

        Only a cleanup of the same namespace deletes it.
        """
        await self._db.run(_PUT, digest, namespace, payload, await self._clock.now())

    async def get(self, digest: str) -> bytes | None:
        row = await self._db.one("SELECT payload FROM claims WHERE digest = ? LIMIT 1", digest)
        return bytes(row[0]) if row else None

    async def size(self, namespace: str, before: float | None = None) -> tuple[int, int]:
        """Returns number and bytes of a namespace's payloads, with `before` (epoch seconds) of those unused since."""
        sql = "SELECT COUNT(*), COALESCE(SUM(LENGTH(payload)), 0) FROM claims WHERE namespace = ? AND at < ?"
        row = await self._db.one(sql, namespace, float("inf") if before is None else before)
        assert row is not None
        return int(row[0]), int(row[1])

    async def drop(self, namespace: str, before: float) -> int:
        """Deletes the namespace's payloads that were not used since `before` (epoch seconds). Returns their number."""
        return await self._db.run("DELETE FROM claims WHERE namespace = ? AND at < ?", namespace, before)
