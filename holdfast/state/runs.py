"""The table `runs`, with one row per request.

A request key always names the same run of an agent, and the run's result outlives Temporal's retention.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from holdfast.state.database import Database


class Run(NamedTuple):
    """A row of `runs`. Times are epoch seconds; `result` is the JSON of a `RunResult`."""

    request_key: str
    workflow_id: str
    agent: str
    tenant: str
    requested_by: str
    input_digest: str
    """Empty for a run that was started without this table, e.g. by hand with `temporal workflow start`."""
    trace_id: str
    created_at: float
    started_at: float | None
    """None: claimed, but not known to have been started. Start it (again) under its workflow id."""
    outcome: str | None
    result: str | None
    ended_at: float | None
    namespace: str | None
    """The Temporal namespace of the run; None for a run from before this column was added."""


class KeyReused(Exception):
    """The request key names a run with another input, or leads to an id that is taken. The message is one line."""


COLUMNS = ", ".join(Run._fields)
INSERT = f"INSERT INTO runs ({COLUMNS}) VALUES ({', '.join('?' * len(Run._fields))}) ON CONFLICT DO NOTHING"


class Runs:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def claim(
        self,
        request_key: str,
        workflow_id: str,
        agent: str,
        input_digest: str,
        *,
        tenant: str = "default",
        requested_by: str = "",
        trace_id: str = "",
        namespace: str | None = None,
    ) -> Run:
        """Returns the run of this request. The first of any number of concurrent callers creates it; all get its row.

        Keys belong to the agent. Raises KeyReused when this key belongs to a run with another input, or the workflow
        id to another agent's run.
        """
        mine = Run(
            request_key,
            workflow_id,
            agent,
            tenant,
            requested_by,
            input_digest,
            trace_id,
            created_at=time.time(),
            started_at=None,
            outcome=None,
            result=None,
            ended_at=None,
            namespace=namespace,
        )
        if await self._db.run(INSERT, *mine):
            return mine
        run = await self.get(agent, request_key) or await self.by_workflow(workflow_id)
        assert run is not None, "the insert met a conflicting row, which is missing; no code deletes rows of `runs`"
        if run.agent != agent:
            raise KeyReused(
                f"request key {request_key!r} leads to the id {run.workflow_id}, which a run of agent {run.agent!r}"
                " has: use another key"
            )
        if run.input_digest not in ("", input_digest):
            raise KeyReused(
                f"request key {request_key!r} belongs to {run.workflow_id}, which has another input"
                f" (digest {run.input_digest}, not {input_digest}): use another key"
            )
        return run

    async def mark_started(self, workflow_id: str) -> None:
        """Records that Temporal has accepted the run. Keeps the time of the first record."""
        await self._db.run(
            "UPDATE runs SET started_at = ? WHERE workflow_id = ? AND started_at IS NULL", time.time(), workflow_id
        )

    async def finish(
        self,
        workflow_id: str,
        outcome: str,
        result: str,
        *,
        agent: str = "",
        tenant: str = "default",
        trace_id: str = "",
        requested_by: str = "",
    ) -> None:
        """Records how a run ended; `result` is JSON. Recording the same end again changes nothing, not even the time.

        A different end replaces the recorded one: a run that was reset ends a second time, and that end is valid.
        A run that was never claimed gets its row here, with its workflow id as the request key.
        """
        now = time.time()
        if await self._end(workflow_id, outcome, result, now):
            return
        # Another run's request may have used this id as its key: a prefix that users do not type avoids the conflict.
        for key in (workflow_id, f"workflow:{workflow_id}"):
            row = Run(key, workflow_id, agent, tenant, requested_by, "", trace_id, now, now, outcome, result, now, None)
            if await self._db.run(INSERT, *row) or await self._end(workflow_id, outcome, result, now):
                return

    async def _end(self, workflow_id: str, outcome: str, result: str, now: float) -> bool:
        """Updates the run's row. Returns False when it has none."""
        sql = (
            "UPDATE runs SET ended_at = CASE WHEN outcome = ? AND result = ? THEN ended_at ELSE ? END,"
            " started_at = COALESCE(started_at, ?), outcome = ?, result = ? WHERE workflow_id = ?"
        )
        return await self._db.run(sql, outcome, result, now, now, outcome, result, workflow_id) == 1

    async def amend(self, workflow_id: str, before: str, outcome: str, result: str) -> bool:
        """Replaces a stored result after a repair. Returns False when the stored result is no longer `before`."""
        sql = "UPDATE runs SET outcome = ?, result = ? WHERE workflow_id = ? AND result = ?"
        return await self._db.run(sql, outcome, result, workflow_id, before) == 1

    async def get(self, agent: str, request_key: str) -> Run | None:
        sql = f"SELECT {COLUMNS} FROM runs WHERE agent = ? AND request_key = ?"
        row = await self._db.one(sql, agent, request_key)
        return Run(*row) if row else None

    async def of_key(self, request_key: str) -> list[Run]:
        """Returns the runs of all agents under this key, newest first, at most 5."""
        sql = f"SELECT {COLUMNS} FROM runs WHERE request_key = ? ORDER BY created_at DESC LIMIT 5"
        return [Run(*row) for row in await self._db.all(sql, request_key)]

    async def by_workflow(self, workflow_id: str) -> Run | None:
        row = await self._db.one(f"SELECT {COLUMNS} FROM runs WHERE workflow_id = ?", workflow_id)
        return Run(*row) if row else None

    async def recent(self, limit: int, batch: str = "") -> list[Run]:
        """Returns the runs claimed last, newest first: those of a batch's items, or all except items of batches."""
        of_a_batch = "EXISTS (SELECT 1 FROM runs b WHERE b.workflow_id = r.requested_by)"
        which = "requested_by = ?" if batch else f"? = '' AND NOT {of_a_batch}"
        rows = await self._db.all(
            f"SELECT {COLUMNS} FROM runs r WHERE {which} ORDER BY created_at DESC LIMIT ?", batch, limit
        )
        return [Run(*row) for row in rows]
