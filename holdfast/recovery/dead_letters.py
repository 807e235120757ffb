"""Dead letters: what could not be processed, with everything that a replay and a person need.

The id of a letter follows from its kind and key: writing it twice makes one letter, and a closed letter stays closed.

    open → replaying → replayed | open        open → settled | dropped

A letter belongs to a workflow: the run that it came from, or a later run that tries the same work again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import StrEnum
from hashlib import sha256
from typing import Any, NamedTuple

from holdfast.contracts.data import Json
from holdfast.state.clock import StoreClock
from holdfast.state.database import Database


class LetterKind(StrEnum):
    CALL = "call"
    """A tool call whose step is left pending, or whose outcome is unknown."""
    UNDO = "undo"
    """A compensation that failed: the effect still stands."""
    RUN = "run"
    """A run that failed."""
    STUCK = "stuck"
    """A run whose history does not replay, and that the resets of the sweep did not repair."""
    HOOK = "hook"
    """A webhook that was not delivered."""


class LetterState(StrEnum):
    OPEN = "open"
    REPLAYING = "replaying"
    REPLAYED = "replayed"
    SETTLED = "settled"
    DROPPED = "dropped"


class DeadLetter(NamedTuple):
    """A row of `dead_letters`. Times are epoch seconds of the store's clock, 0 and None before it is written."""

    id: str
    kind: str
    state: str
    agent: str
    tenant: str
    workflow_id: str
    key_base: str
    key: str
    """The ledger key; empty for a run, and for a step whose tools were never called."""
    subject: str
    """The tool, or the agent of a run."""
    role: str
    cause: str
    context: str
    """JSON: the input of a run, the call's arguments and failed attempts, …"""
    created_at: float = 0.0
    closed_at: float | None = None
    note: str = ""
    """How it was closed, by whom and why."""

    @property
    def details(self) -> Json:
        return json.loads(self.context)


def letter_id(kind: LetterKind, key: str) -> str:
    """Short, and the same for the same thing: `call-3f9a2b1c04`."""
    return f"{kind}-{sha256(key.encode()).hexdigest()[:10]}"


COLUMNS = ", ".join(DeadLetter._fields)

# A run that fails again after a reset or a replay updates its letter. A late write of another run changes nothing.
_WRITE = f"""
INSERT INTO dead_letters ({COLUMNS}) VALUES ({", ".join("?" * len(DeadLetter._fields))})
ON CONFLICT (id) DO UPDATE SET cause = excluded.cause, context = excluded.context, key_base = excluded.key_base,
    state = CASE WHEN dead_letters.kind = 'run' THEN 'open' ELSE dead_letters.state END
WHERE dead_letters.state IN ('open', 'replaying') AND dead_letters.workflow_id = excluded.workflow_id"""

_FIND = f"""
SELECT {COLUMNS} FROM dead_letters
WHERE (? = '' OR agent = ?) AND (? = '' OR subject = ?) AND (? = '' OR kind = ?) AND (? = '' OR state = ?)
ORDER BY created_at, id"""

_CLAIM = """
UPDATE dead_letters SET state = 'replaying', note = ?
WHERE id = ? AND workflow_id = ? AND state IN ('open', 'replaying')"""

_CLOSE = """
UPDATE dead_letters SET state = ?, note = ?, closed_at = ? WHERE id = ? AND state IN ('open', 'replaying')"""

_HAND_OVER = """
UPDATE dead_letters SET state = 'replaying', workflow_id = ?, context = ?, note = ?
WHERE id = ? AND workflow_id = ? AND state IN ('open', 'replaying')"""


class DeadLetters:
    def __init__(self, db: Database) -> None:
        self._db = db
        self._clock = StoreClock(db)

    async def write(self, letters: Iterable[DeadLetter]) -> None:
        """Writes letters. An open letter that exists gets the new cause and context; a closed one stays as it is."""
        for letter in letters:
            await self._db.run(_WRITE, *letter._replace(created_at=await self._clock.now()))

    async def get(self, id: str) -> DeadLetter | None:
        row = await self._db.one(f"SELECT {COLUMNS} FROM dead_letters WHERE id = ?", id)
        return DeadLetter(*row) if row else None

    async def find(self, *, agent: str = "", tool: str = "", kind: str = "", state: str = "") -> list[DeadLetter]:
        """The letters that match, the oldest first. An empty filter matches all."""
        filters = (word for word in (agent, tool, kind, state) for _ in range(2))
        return [DeadLetter(*row) for row in await self._db.all(_FIND, *filters)]

    async def of_workflow(self, workflow_id: str) -> list[DeadLetter]:
        """The letters of a workflow that are not closed, except those of webhooks."""
        sql = f"SELECT {COLUMNS} FROM dead_letters WHERE workflow_id = ? AND state IN ('open', 'replaying')"
        rows = await self._db.all(f"{sql} AND kind <> 'hook' ORDER BY id", workflow_id)
        return [DeadLetter(*row) for row in rows]

    async def claim(self, id: str, workflow_id: str, note: str) -> bool:
        """Marks it as being replayed. False when it is closed, or belongs to another workflow by now. Idempotent."""
        return await self._db.run(_CLAIM, note, id, workflow_id) == 1

    async def hand_over(self, letter: DeadLetter, workflow_id: str, context: Json, note: str) -> bool:
        """Gives the letter to the run that tries its work again. False when another process was first."""
        return await self._db.run(_HAND_OVER, workflow_id, dump(context), note, letter.id, letter.workflow_id) == 1

    async def give_back(self, letter: DeadLetter, workflow_id: str, note: str) -> None:
        """Opens a letter again that was handed over to a run, and gives it to `workflow_id`."""
        sql = "UPDATE dead_letters SET state = 'open', workflow_id = ?, note = ? WHERE id = ? AND state = 'replaying'"
        await self._db.run(sql, workflow_id, note, letter.id)

    async def reopen(self, id: str, cause: str, note: str) -> None:
        """Opens a letter again whose replay failed."""
        sql = "UPDATE dead_letters SET state = 'open', cause = ?, note = ? WHERE id = ? AND state = 'replaying'"
        await self._db.run(sql, cause, note, id)

    async def close(self, id: str, state: LetterState, note: str) -> bool:
        """Closes a letter. False when it is closed already, or does not exist."""
        return await self._db.run(_CLOSE, state, note, await self._clock.now(), id) == 1

    async def drop(self, id: str, note: str) -> bool:
        """Drops an open letter. False when it is closed, or is being replayed."""
        sql = "UPDATE dead_letters SET state = 'dropped', note = ?, closed_at = ? WHERE id = ? AND state = 'open'"
        return await self._db.run(sql, note, await self._clock.now(), id) == 1


def dump(context: Any) -> str:
    return json.dumps(context, ensure_ascii=False)
