"""`starter.py dlq` and `starter.py orphans`: dead letters, and effects that ended runs left behind."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from shlex import quote
from typing import Any

from rich.padding import Padding
from rich.text import Text
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError

from holdfast.cli.lookup import temporal_result
from holdfast.cli.output import Refused, counted, err, out, print_json
from holdfast.cli.runs import clock, connect
from holdfast.contracts.data import Json
from holdfast.contracts.profile import Effect
from holdfast.contracts.recovery import RepairResult, Sweep, Swept
from holdfast.contracts.run import RunResult
from holdfast.contracts.tool_call import key_base
from holdfast.contracts.webhooks import Delivered
from holdfast.contracts.wording import ID, did_you_mean, in_words
from holdfast.engine.executions import result_of
from holdfast.engine.starting import BadRequest
from holdfast.recovery.dead_letters import DeadLetter, DeadLetters, LetterKind, LetterState
from holdfast.recovery.requests import repair_of, replay_run, send_again, start_repair
from holdfast.reliability.ledger import Entry, Ledger, State
from holdfast.settings import settings
from holdfast.state.database import Database
from holdfast.state.opening import open_database
from holdfast.state.version import check_schema

COLOURS = {
    LetterState.OPEN: "yellow",
    LetterState.REPLAYING: "cyan",
    LetterState.REPLAYED: "green",
    LetterState.SETTLED: "green",
    LetterState.DROPPED: "magenta",
}


@dataclass(frozen=True)
class Filter:
    """Selects dead letters; an empty field matches all."""

    agent: str = ""
    tool: str = ""
    kind: str = ""
    state: str = ""

    def __post_init__(self) -> None:
        """Raises Refused for an unknown kind or state."""
        for name, value, known in (("kind", self.kind, list(LetterKind)), ("state", self.state, list(LetterState))):
            if value and value not in known:
                raise Refused(f"--{name} {value}: there are {', '.join(known)}{did_you_mean(value, known)}")

    def __bool__(self) -> bool:
        return any((self.agent, self.tool, self.kind, self.state))


@asynccontextmanager
async def store() -> AsyncIterator[Database]:
    """The store. Raises StoreUnavailable, SchemaMismatch."""
    db = await open_database(settings().store_url)
    try:
        await check_schema(db)
        yield db
    finally:
        await db.close()


# ------------------------------------------------------------------ looking


async def listing(wanted: Filter, as_json: bool) -> int:
    async with store() as db:
        found = await DeadLetters(db).find(agent=wanted.agent, tool=wanted.tool, kind=wanted.kind, state=wanted.state)
        meant = "" if found else _meant(wanted, await DeadLetters(db).find())
    found = [letter for letter in found if wanted.state or letter.closed_at is None]
    if as_json:
        print_json([as_data(letter) for letter in found])
        return 0
    if not found:
        out.print("no dead letters" + (f" that fit{meant}" if wanted else ""), markup=False)
        return 0
    for each in found:
        state = Text(each.state, COLOURS[LetterState(each.state)])
        review = f", for {each.role} review" if each.role else ""
        out.print(Text(each.id, "bold"), state, Text(f"since {clock(each.created_at)}{review}"))
        # Not shortened: the cause may be all that a person needs to act.
        for line in (headline(each), f"cause: {each.cause}"):
            out.print(Padding(Text(line), (0, 0, 0, 2)))
    out.print("[dim]uv run starter.py dlq show LETTER[/dim]")
    return 0


def _meant(wanted: Filter, there: list[DeadLetter]) -> str:
    """A hint at the agent or tool that was meant, when the filter's one has no dead letters."""
    known = ((wanted.agent, {each.agent for each in there}), (wanted.tool, {each.subject for each in there}))
    return "".join(did_you_mean(name, names) for name, names in known if name not in names)


async def show(id: str, as_json: bool) -> int:
    async with store() as db:
        letter = await find(DeadLetters(db), id)
        entry = await Ledger(db, "").entry(letter.key) if letter.key else None
    if as_json:
        print_json({**as_data(letter), "commands": commands(letter, entry)})
        return 0
    details = letter.details
    out.print(Text(letter.id, "bold"), Text(letter.state, COLOURS[LetterState(letter.state)]))
    out.print(headline(letter), markup=False)
    out.print(f"cause: {letter.cause}", markup=False)
    review = f", for {letter.role} review" if letter.role else ""
    out.print(f"since {clock(letter.created_at)}{review}", markup=False)
    if letter.note:
        out.print(f"note: {letter.note}", markup=False)
    for title, value in (("input", details.get("input")), ("arguments", details.get("arguments"))):
        if value:
            out.print(f"{title}:")
            for name, each in value.items():
                out.print(f"  {name}: {in_words(each)}", markup=False)
    if entry:
        begun = f"begun {clock(entry.reserved_at)} by {entry.worker}"
        out.print(f"the ledger now says {entry.state}: attempt {entry.attempt}, {begun}", markup=False)
    if attempts := details.get("attempts"):
        out.print(f"failed attempts ({len(attempts)}):")
        for each in attempts:
            out.print(f"  {clock(each['at'])}  {each['worker']}  {each['error']}  [{each['key']}]", markup=False)
    if keys := details.get("keys"):
        out.print("ledger keys:")
        for key in keys:
            out.print(f"  {key}", markup=False)
    for command in commands(letter, entry):
        out.print(f"→ {command}", markup=False)
    return 0


def headline(letter: DeadLetter) -> str:
    """What could not be processed, in a sentence."""
    match letter.kind:
        case LetterKind.CALL:
            step = letter.details.get("step") or letter.subject
            return f"Step {step} of {letter.workflow_id} is left pending: call of {letter.subject}"
        case LetterKind.UNDO:
            return f"The effect of {letter.subject} in {letter.workflow_id} still stands: its compensation failed"
        case LetterKind.HOOK:
            return f"{letter.subject} of {letter.workflow_id} was not delivered: {letter.details['arguments']['url']}"
        case LetterKind.STUCK:
            return f"{letter.workflow_id} is stuck: its history does not replay, and the sweep has given up on it"
        case _:
            return f"A run of agent {letter.subject} failed: {letter.workflow_id}"


def commands(letter: DeadLetter, entry: Entry | None) -> list[str]:
    """The commands that a person can run now. entry: the call's row in the ledger."""
    if letter.state == LetterState.REPLAYING and letter.kind == LetterKind.RUN:
        replay = f"uv run starter.py dlq replay {letter.id}"
        return [f"uv run starter.py follow {quote(letter.workflow_id)}", f"{replay} (if that run is gone)"]
    if letter.state not in (LetterState.OPEN, LetterState.REPLAYING):
        return []
    details = letter.details
    if letter.kind == LetterKind.STUCK:
        return [*details["commands"], f"uv run starter.py dlq drop {letter.id} --why WHY"]
    settle = f"uv run starter.py settle {quote(letter.workflow_id)} {quote(letter.key or str(details.get('step')))}"
    settling = [f"{settle} --happened [--result JSON] [--comment WHY]", f"{settle} --did-not --comment WHY"]
    replay = [f"uv run starter.py dlq replay {letter.id}"]
    drop = [f"uv run starter.py dlq drop {letter.id} --why WHY"]
    if letter.kind in (LetterKind.RUN, LetterKind.HOOK):
        return replay + drop
    if letter.kind == LetterKind.UNDO:
        return replay + settling[:1] + drop
    blind = entry is None or (entry.effect == Effect.MANUAL and entry.state in (State.UNKNOWN, State.RESERVED))
    return ([] if blind else replay) + settling + drop


def as_data(letter: DeadLetter) -> Json:
    return {**letter._asdict(), "context": letter.details}


async def find(letters: DeadLetters, id: str) -> DeadLetter:
    """The dead letter with this id. Raises Refused when there is none."""
    letter = await letters.get(id)
    if letter is None:
        meant = did_you_mean(id, [each.id for each in await letters.find()], ID)
        raise Refused(f"no dead letter {id!r}: `uv run starter.py dlq list` shows those there are{meant}")
    return letter


# ------------------------------------------------------------------ acting


async def replay(ids: list[str], wanted: Filter, by: str, yes: bool, as_json: bool) -> int:
    """Replays letters one by one and reports how each ended. Returns 0 when all succeeded, else 1; refused: 2."""
    async with store() as db:
        letters = DeadLetters(db)
        if ids:
            chosen = [await find(letters, id) for id in ids]
        elif wanted:
            chosen = await letters.find(agent=wanted.agent, tool=wanted.tool, kind=wanted.kind, state=LetterState.OPEN)
        else:
            raise Refused("name letters, or a filter such as --tool TOOL: `uv run starter.py dlq list` shows them")
        if not chosen:
            raise Refused("no open dead letter fits: `uv run starter.py dlq list` shows those there are")
        if not yes:
            confirm(chosen)
        client = await connect()
        ends = [await _replay_one(client, db, letter, by, as_json) for letter in chosen]
    if as_json:
        print_json(ends)
    return 0 if all(end["ok"] for end in ends) else 1


def confirm(chosen: list[DeadLetter]) -> None:
    """Shows what a replay will do and asks. Raises Refused without a yes, and when stdin is no terminal."""
    for letter in chosen:
        err.print(f"{letter.id}: {headline(letter)}: {letter.cause}", markup=False)
    if not sys.stdin.isatty():
        raise Refused(f"replaying {counted(len(chosen), 'dead letter')} needs --yes: stdin is no terminal to ask at")
    err.print(f"replay {counted(len(chosen), 'dead letter')}? [y/N] ", end="", markup=False)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused("nothing was replayed")


async def _replay_one(client: Client, db: Database, letter: DeadLetter, by: str, as_json: bool) -> Json:
    """Replays a letter, waits for the end and reports it."""
    try:
        if letter.kind == LetterKind.RUN:
            ok, words, where = await _run_again(client, db, letter, by)
        else:
            if letter.kind == LetterKind.HOOK:
                handle = await send_again(client, db, letter, by, settings().task_queue)
            else:
                handle = await start_repair(client, await repair_of(letter, db, by), settings().task_queue)
            err.print(f"[dim]{letter.id}: {handle.id}[/dim]")
            ok, words = await wait_for(handle)
            where = handle.id
    except BadRequest as refused:
        ok, words, where = False, str(refused), ""
    if not as_json:
        out.print(Text("✓" if ok else "✗", "green" if ok else "red"), Text(f"{letter.id}: {words}"))
    return {"id": letter.id, "ok": ok, "words": words, "workflow_id": where}


async def _run_again(client: Client, db: Database, letter: DeadLetter, by: str) -> tuple[bool, str, str]:
    started = await replay_run(client, db, letter, by, settings().task_queue)
    see = f"uv run starter.py approvals {quote(started.workflow_id)}"
    err.print(f"{letter.id}: {started.workflow_id} runs; it may ask: `{see}`")
    handle = client.get_workflow_handle(started.workflow_id, result_type=RunResult)
    try:
        result = await temporal_result(handle)
    except asyncio.CancelledError:
        err.print(f"left; the run goes on: uv run starter.py follow {quote(started.workflow_id)}")
        raise
    if result is None:
        return False, f"{started.workflow_id} ended without a result", started.workflow_id
    words = f"{started.workflow_id} ended {result.outcome}" + (f": {result.reason}" if result.reason else "")
    return not result.outcome.unwinds, words, started.workflow_id


async def wait_for(handle: WorkflowHandle[Any, RepairResult] | WorkflowHandle[Any, Delivered]) -> tuple[bool, str]:
    """Waits for a repair or a delivery. Returns whether all of it succeeded, and a description."""
    try:
        result = await result_of(handle)
    except WorkflowFailureError as error:
        words = error.cause.message if isinstance(error.cause, ApplicationError) else f"it ended: {error.cause}"
        return False, words
    except asyncio.CancelledError:
        err.print(f"left; the replay goes on as workflow {handle.id}")
        raise
    outcome = result.outcome if isinstance(result, RepairResult) else None
    after = f" (the run is {outcome} now)" if outcome else ""
    return result.ok, result.words + after


async def drop(ids: list[str], why: str, by: str, as_json: bool) -> int:
    """Closes letters without a replay."""
    async with store() as db:
        letters = DeadLetters(db)
        for letter in [await find(letters, id) for id in ids]:
            if not await letters.drop(letter.id, f"dropped by {by}: {why}"):
                now = await find(letters, letter.id)
                raise Refused(f"{letter.id} cannot be dropped: it is {now.state} ({now.note})")
            if not as_json:
                out.print(f"{letter.id} dropped")
    if as_json:
        print_json([{"id": id, "state": LetterState.DROPPED} for id in ids])
    return 0


# ------------------------------------------------------------------ orphans


async def orphans(fix: bool, grace_s: float, as_json: bool) -> int:
    """Lists or repairs runs that ended without undoing their effects. Returns 0 when none are left, else 1."""
    from holdfast.recovery.orphans import find_orphans
    from holdfast.recovery.resets import find_stuck

    client = await connect()
    if fix:
        return await _sweep(client, grace_s, as_json)
    async with store() as db:
        found = await find_orphans(db, client, grace_s)
    stuck = await find_stuck(client)
    if as_json:
        orphaned = [{"workflow_id": each.workflow_id, "key_base": each.key_base, "stuck": False} for each in found]
        waiting = [{"workflow_id": e.id, "key_base": key_base(e.id, e.first_run_id), "stuck": True} for e in stuck]
        print_json(orphaned + waiting)
        return 1 if found or stuck else 0
    for each in stuck:
        words = f"its history does not replay, and its workflow task has failed {each.task_attempt} times"
        out.print(f"{each.id}: {words}; `uv run starter.py orphans --fix` resets it now", markup=False)
    if not found:
        out.print("no run has left effects behind")
    else:
        for each in found:
            out.print(f"{each.workflow_id}: its workflow has ended, its effects still stand", markup=False)
        out.print("→ uv run starter.py orphans --fix undoes them now; the sweep undoes them within five minutes")
    return 1 if found or stuck else 0


async def _sweep(client: Client, grace_s: float, as_json: bool) -> int:
    """Runs the sweep now and waits for the repairs that it starts."""
    import secrets

    id = f"orphan-sweep-{secrets.token_hex(4)}"
    err.print(f"[dim]sweeping as workflow {id}, on a worker[/dim]")
    sweep = await client.start_workflow(
        "OrphanSweep",
        Sweep(grace_s=grace_s),
        id=id,
        task_queue=settings().task_queue,
        result_type=Swept,
    )
    swept = await result_of(sweep)
    ends: list[Json] = []
    for id in swept.found:
        ok, words = await wait_for(client.get_workflow_handle(id, result_type=RepairResult))
        ends.append({"workflow_id": id, "ok": ok, "words": words})
        if not as_json:
            out.print(Text("✓" if ok else "✗", "green" if ok else "red"), Text(f"{id}: {words}"))
    if as_json:
        print_json(ends)
        return 0 if all(end["ok"] for end in ends) else 1
    for line in swept.stuck:
        out.print(line, markup=False)
    if not ends and not swept.stuck:
        out.print("nothing to undo")
    return 0 if all(end["ok"] for end in ends) else 1
