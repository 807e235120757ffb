"""What the commands do with runs. This module imports no workflow code, so that commands start fast."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.markup import escape
from rich.text import Text
from temporalio.client import Client, WorkflowUpdateFailedError, WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.service import RPCError, RPCStatusCode

from holdfast.authoring import registry
from holdfast.cli import columns, unfinished, view
from holdfast.cli.columns import clock
from holdfast.cli.following import Follower
from holdfast.cli.lookup import (
    ANSWER,
    Handle,
    Known,
    NoAnswer,
    ask,
    find,
    find_running,
    link,
    open_runs,
    status_word,
    stored,
    temporal_result,
)
from holdfast.cli.output import Refused, err, out, parse_json, print_json, read_stdin
from holdfast.cli.stuck import in_flight
from holdfast.contracts import door, outside
from holdfast.contracts.data import Json
from holdfast.contracts.people import Approval, ApprovalDecision, DecisionReply, Message, Verdict
from holdfast.contracts.run import Phase, RunResult, RunStatus
from holdfast.contracts.wording import answer_commands, did_you_mean
from holdfast.engine.client import connect
from holdfast.engine.executions import OPEN, Execution, describe, listed
from holdfast.settings import settings
from holdfast.state.database import StoreUnavailable
from holdfast.state.opening import open_database
from holdfast.state.runs import Runs

if TYPE_CHECKING:
    from holdfast.engine.starting import Started

# ------------------------------------------------------------------ run


async def run(agent: str, value: str, key: str, *, webhook: str, wait: bool, follow_it: bool, as_json: bool) -> int:
    """Starts a run, or finds the one with this key, and prints its id at once. Returns the exit status."""
    import getpass

    data = read_input(value)
    client = await connect()
    started = await begin(client, agent, data, key, getpass.getuser(), webhook=webhook)
    url = link(client, started.workflow_id)
    told = {"workflow_id": started.workflow_id, "request_key": started.request_key, "new": started.new, "url": url}
    if as_json:
        if not (wait or follow_it):
            print_json(told)
    else:
        print(started.workflow_id, flush=True)
        before = (
            "" if started.new else f"  (started before with the same key{await _ended(client, started.workflow_id)})"
        )
        err.print(f"[dim]{url}{before}[/dim]")
    if not (wait or follow_it):
        return 0
    return await follow(client, started.workflow_id, silent=wait, as_json=as_json, told=told if wait else None)


async def _ended(client: Client, workflow_id: str) -> str:
    """`; it ended failed`; empty while it runs."""
    known = await find(client, workflow_id, with_row=True)
    if known.running:
        return ""
    outcome = known.row.outcome if known.row else None
    return f"; it ended {outcome or status_word(known.execution)}"


async def begin(client: Client, agent: str, value: Json, key: str, by: str, *, webhook: str = "") -> Started:
    """Starts a run, or finds the one with this key. Raises what `start_run` raises, and SchemaMismatch."""
    from holdfast.engine.starting import start_run
    from holdfast.state.version import check_schema

    db = await open_database(settings().store_url)
    try:
        await check_schema(db)
        return await start_run(
            client,
            Runs(db),
            agent,
            value,
            task_queue=settings().task_queue,
            request_key=key,
            requested_by=by,
            webhook=webhook,
        )
    finally:
        await db.close()


def read_input(value: str, option: str = "--input") -> Json:
    """The JSON object that an option gives: inline, in a file, on stdin (`-`), or as a folder. Raises Refused."""
    text, source = value, option
    if value == "-":
        text, source = read_stdin(option), "stdin"
    elif value and not value.lstrip().startswith(("{", "[", '"')):
        try:
            if Path(value).is_dir():
                return {"folder": str(Path(value).resolve())}
            text, source = Path(value).read_text(), value
        except (OSError, ValueError) as error:
            words = f"{option} is neither a JSON object nor a readable file or folder: {value} ({error})"
            raise Refused(words) from None
    data = parse_json(source, text or "{}", outside.MAX_INPUT)
    if not isinstance(data, dict):
        raise Refused(f'{source} has to be a JSON object such as \'{{"patient_id": "…"}}\', not {type(data).__name__}')
    return data


# ------------------------------------------------------------------ looking


async def follow(
    client: Client, workflow_id: str, *, silent: bool = False, as_json: bool = False, told: Json | None = None
) -> int:
    """Shows a run until it ends and returns the outcome's exit status. Ctrl-C leaves the run going and says so."""
    known = await find(client, workflow_id)
    try:
        if not silent and known.running:
            await watch(client, known.handle, as_json)
        elif known.running:
            if words := known.paused_words:
                err.print(f"[yellow]note:[/yellow] {escape(workflow_id)} is {escape(words)}")
            await temporal_result(known.handle)
    except asyncio.CancelledError:
        err.print(f"left; the run goes on: uv run starter.py follow {quote(workflow_id)}")
        raise
    known = await find(client, workflow_id, with_row=True)
    result = await known.result()
    if result is None:
        why = await unfinished.words(client, known.execution) if known.execution is not None else "its record is gone"
        raise Refused(f"{workflow_id} ended without a result: {why}")
    if as_json:
        print_json({**(told or {"workflow_id": workflow_id}), "result": result})
    else:
        out.print(view.result_view(workflow_id, result))
    return result.outcome.exit_code


async def watch(client: Client, handle: Handle, as_json: bool) -> None:
    """Shows every change of the status until the run ends; without a terminal, also how to answer what is asked."""
    with Live(console=out, auto_refresh=False, transient=True) as live:
        follower = Follower(client, handle.id, as_json, live)
        looking = asyncio.create_task(follower.look_for_questions())
        try:
            async for status in changes(client, handle):
                follower.show(status)
                if looking.done():
                    looking.result()
        finally:
            looking.cancel()


async def changes(client: Client, handle: Handle, every_s: float = 0.3) -> AsyncIterator[RunStatus | str]:
    """Yields the status whenever it changes, and a line of text while the run stands still. Ends with the run.

    It polls the server; it queries the run only when its history has grown since the last answer.
    """
    ended = asyncio.create_task(temporal_result(handle))
    told: RunStatus | None = None
    said, answered = "", ("", 0)
    quiet = every_s
    try:
        while not ended.done():
            execution = await describe(client, handle.id)
            before, line = (told, said), "; ".join(await _standing_still(client, execution))
            if execution.open and execution.version != answered and not execution.paused:
                try:
                    now: RunStatus = await ask(client, handle, "status", RunStatus)
                except NoAnswer as error:
                    line = str(error)
                else:
                    answered = execution.version
                    if now != told:
                        yield now
                    told = now
            if line and line != said:
                yield line
            said = line
            # Poll a run that waits for days less often.
            quiet = every_s if (told, said) != before else min(quiet * 1.3, 2.0)
            await asyncio.wait((ended,), timeout=quiet)
        await ended
    finally:
        ended.cancel()


async def status(workflow_id: str, as_json: bool) -> int:
    client = await connect()
    known = await find(client, workflow_id)
    found, source, complaint = await look(client, known)
    open_ones = await in_flight(client, known.execution)
    if as_json:
        server = status_word(known.execution)
        told: Json = {"workflow_id": workflow_id, "source": source if found else "server", "temporal": server}
        print_json({**told, "status": found, "in_flight": open_ones, "note": complaint})
        return 0
    if found is not None:
        out.print(view.status_view(workflow_id, found))
    else:
        row = known.row or await stored(workflow_id)
        out.print(Text(workflow_id, "bold"), Text(status_word(known.execution), "cyan"))
        if row is not None:
            out.print(f"agent {row.agent}, asked for by {row.requested_by or 'unknown'} at {clock(row.created_at)}")
    for each in open_ones:
        if found is None or each["said"] or each["paused"]:  # the status shows activities that run normally
            again = f", again at {clock(each['next_at'])}" if each["next_at"] else ""
            said = f": {each['said']}" if each["said"] else ""
            paused = f", {each['paused']}" if each["paused"] else ""
            out.print(f"in flight: {each['activity']}, attempt {each['attempt']}{again}{said}{paused}", markup=False)
    if complaint:
        err.print(f"[yellow]note: {complaint}[/yellow]")
    if known.execution is not None:
        asks = found is not None and found.approvals
        out.print(Text(link(client, workflow_id, known.execution.run_id if asks else ""), "dim"))
    return 0


async def _standing_still(client: Client, execution: Execution) -> list[str]:
    """Reasons why a run stands still that its worker cannot report: the run or one of its activities is paused."""
    stuck = [f"{each['activity']} is {each['paused']}" for each in await in_flight(client, execution) if each["paused"]]
    return [*filter(None, (execution.paused_words,)), *stuck]


async def look(client: Client, known: Known) -> tuple[RunStatus | None, str, str]:
    """A run's status, its source (`workflow` or `store`), and a note on what is wrong with the run."""
    if not known.running and (result := await known.result()):
        # Only the store has repairs that were made after the end.
        return from_result(result), "store", ""
    if known.execution is None:
        return None, "workflow", ""
    if not known.running:
        return None, "workflow", await unfinished.words(client, known.execution)
    try:
        return await ask(client, known.handle, "status", RunStatus), "workflow", ""
    except NoAnswer as error:
        again = await find(client, known.workflow_id)
        if again.running:
            return None, "workflow", str(error)
        return await look(client, again)  # it has ended since


def from_result(result: RunResult) -> RunStatus:
    """The status of a run that has ended."""
    return RunStatus(
        agent=result.agent,
        phase=Phase.ENDED,
        line=result.reason or result.summary,
        percent=result.percent if result.steps else 100,
        steps=result.steps,
        notes=result.notes,
        turn=result.turns,
        calls=result.calls,
        usage=result.usage,
        model=result.model,
        key_base=result.key_base,
        trace_id=result.trace_id,
        undone=result.undone,
        outcome=result.outcome,
        stands=result.stands,
    )


async def ended(client: Client, workflow_id: str) -> RunResult:
    """How a run ended. Raises Refused when it has not ended, or its end is not recorded."""
    known = await find(client, workflow_id, with_row=True)
    if known.running:
        how = known.paused_words or f"still running: `uv run starter.py follow {quote(workflow_id)}` waits for its end"
        raise Refused(f"{workflow_id} is {how}")
    found = await known.result()
    if found is None:
        raise Refused(
            f"{workflow_id} has no result: it is {status_word(known.execution)} in Temporal, and none is stored"
        )
    return found


async def result(workflow_id: str, as_json: bool) -> int:
    found = await ended(await connect(), workflow_id)
    if as_json:
        print_json({"workflow_id": workflow_id, "result": found})
    else:
        out.print(view.result_view(workflow_id, found))
    return 0


async def listing(limit: int, batch: str, as_json: bool) -> int:
    """Lists runs, newest first: those that Temporal lists, and from the store those past retention.

    batch: lists the runs of its items; without it, they are left out.
    """
    client = await connect()
    try:
        async with open_runs() as runs:
            rows = {row.workflow_id: row for row in await runs.recent(limit, batch)}
    except StoreUnavailable as error:
        err.print(f"[yellow]note: {error}[/yellow]")
        rows = {}
    found: dict[str, Json] = {}
    # Query only attributes that every server has: the server refuses one that is not registered.
    if '"' in batch:
        raise Refused(f"--batch: no run has an id like {batch}")
    parent = f'ParentWorkflowId = "{batch}"' if batch else "ParentWorkflowId IS NULL"
    query = f'WorkflowType IN ("AgentWorkflow", "BatchWorkflow") AND {parent}'
    async for execution in listed(client, query, limit):
        if execution.id in found:  # an earlier execution of the same run, before its continue-as-new
            continue
        attributes = execution.attributes
        row = rows.get(execution.id)
        running = execution.open
        word = attributes.get("HoldfastStatus", "running") if execution.status == "running" else execution.status
        found[execution.id] = {
            "workflow_id": execution.id,
            "agent": attributes.get("HoldfastAgent") or (row.agent if row else execution.id.partition("-")[0]),
            "status": row.outcome if row and row.outcome and not running else word,
            "stage": attributes.get("HoldfastStage", "") if running else "",
            # A row without an input was written at the run's end.
            "started_at": row.created_at if row and row.input_digest else execution.started_at,
            "ended_at": execution.ended_at,
            "running": running,
            "note": unfinished.note(execution, recorded=bool(row and row.outcome)),
        }
    for row in rows.values():
        word = row.outcome or ("unknown" if row.started_at else "never started")
        found.setdefault(
            row.workflow_id,
            {
                "workflow_id": row.workflow_id,
                "agent": row.agent,
                "status": word,
                "stage": "",
                "started_at": row.created_at,
                "ended_at": row.ended_at,
                "running": False,
                "note": "",
            },
        )
    newest = sorted(found.values(), key=lambda each: each["started_at"], reverse=True)[:limit]
    if as_json:
        print_json(newest)
        return 0
    if not newest:
        out.print("no runs yet: `uv run starter.py run AGENT --input '{…}'` starts one")
        return 0
    now = datetime.now(UTC).timestamp()
    for line in columns.lines([columns.row(each, now, short=out.is_terminal) for each in newest], columns.room(out)):
        out.print(line, soft_wrap=True)
    for each in newest:
        if each["note"]:
            err.print(f"note: {each['workflow_id']}: {each['note']}", style="yellow", markup=False, soft_wrap=True)
    return 0


# ------------------------------------------------------------------ acting


async def approvals(workflow_id: str | None, role: str, as_json: bool) -> int:
    client = await connect()
    found, notes = await waiting(client, workflow_id, role)
    pages = {each: link(client, each, (await describe(client, each)).run_id) for each in dict(found)}
    for note in notes:
        err.print(f"[yellow]note: {note}[/yellow]")
    if as_json:
        print_json([{"workflow_id": each, "approval": approval, "url": pages[each]} for each, approval in found])
    elif not found:
        out.print(
            f"nothing waits for {role} review{_role(role)}" if role else "nothing waits for a human", markup=False
        )
    else:
        for each, approval in found:
            out.print(Text(each, "bold"))
            out.print(view.approval_view(each, approval))
        for url in pages.values():
            out.print(Text(f"in the Web UI: {url}", "dim"), soft_wrap=True)
    return 0


def _role(role: str) -> str:
    """A hint at the role that was meant, when no agent here names this one."""
    there = {each.role for spec in registry.agents().values() for each in (*spec.tools, *spec.steps)} - {""}
    return "" if role in there else did_you_mean(role, there)


async def waiting(
    client: Client, workflow_id: str | None = None, role: str = ""
) -> tuple[list[tuple[str, Approval]], list[str]]:
    """Open requests to people in one run, in a batch's runs, or in all, and notes on runs that do not answer.

    role: only requests to this role.
    """
    known = await find_running(client, workflow_id) if workflow_id is not None else None
    if known and known.execution and known.execution.type == "AgentWorkflow":
        ids = [known.workflow_id]
    else:
        query = f'WorkflowType = "AgentWorkflow" AND {OPEN}'
        query += f' AND ParentWorkflowId = "{known.workflow_id}"' if known else ""
        ids = [execution.id async for execution in listed(client, query)]
    found: list[tuple[str, Approval]] = []
    notes: list[str] = []
    for each in ids:
        try:
            opened = await ask(client, client.get_workflow_handle(each), "approvals", list[Approval])
        except NoAnswer as error:
            notes.append(f"{each}: {error}")
            continue
        found += [(each, approval) for approval in opened if role in ("", approval.role)]
    return found, notes


async def decide(
    workflow_id: str, approval_id: str, verdict: Verdict, approver: str, comment: str, as_json: bool
) -> int:
    """Answers one approval, or all that are open now. Returns 0 when the run accepted every answer, else 2."""
    client = await connect()
    handle = (await find_running(client, workflow_id)).handle
    if approval_id:
        wanted = [(approval_id, "")]
    else:
        try:
            opened: list[Approval] = await ask(client, handle, "approvals", list[Approval])
        except NoAnswer as error:
            raise Refused(f"{error}; name the approval's id to have the answer kept for later") from None
        wanted = [(approval.id, approval.digest) for approval in opened if approval.kind in ("tool", "refusal")]
        if not wanted and opened:
            hint = answer_commands(workflow_id, opened[0])[0]
            asks = "asks a question" if opened[0].kind == "question" else "asks how a call ended"
            raise Refused(f"{workflow_id} {asks}, not whether something may run: uv run starter.py {hint}")
        if not wanted:
            raise Refused(f"{workflow_id} waits for no approval: see `uv run starter.py status {quote(workflow_id)}`")
    decisions = [checked_decision(each, verdict, approver, comment, digest=digest) for each, digest in wanted]
    return report([await send(handle, decision) for decision in decisions], as_json)


def checked_decision(approval_id: str, verdict: Verdict, by: str, comment: str, **more: Any) -> ApprovalDecision:
    """A decision, checked as the run will check it. Raises Unfit."""
    given = {"approval_id": approval_id, "verdict": verdict, "approver": by, "comment": comment, **more}
    return door.checked(ApprovalDecision, given)


@dataclass(frozen=True)
class Sent:
    """A decision or message that was sent to a run, and the reply."""

    said: ApprovalDecision | Message
    reply: DecisionReply
    how: str
    """`update` or `signal`."""

    @property
    def json(self) -> Json:
        about: Json = {"approval_id": self.said.approval_id} if isinstance(self.said, ApprovalDecision) else {}
        return {**about, "accepted": self.reply.accepted, "message": self.reply.message, "sent_as": self.how}


def report(sent: Sent | list[Sent], as_json: bool) -> int:
    """Prints the replies. Returns 0 when the run accepted all of them, else 2."""
    several = sent if isinstance(sent, list) else [sent]
    if as_json:
        print_json([each.json for each in sent] if isinstance(sent, list) else sent.json)
    else:
        for each in several:
            if each.reply.accepted:
                out.print(each.reply.message, markup=False)
            else:
                print(f"error: {each.reply.message}", file=sys.stderr)
    return 0 if all(each.reply.accepted for each in several) else 2


async def send(handle: Handle, said: ApprovalDecision | Message) -> Sent:
    """Sends an Update, which returns a reply; when no worker answers, a Signal, which stays in the history."""
    name, what = ("message", "it") if isinstance(said, Message) else ("decide", said.verdict)
    why = "no worker answered", "a worker is back"
    try:
        reply = await asyncio.wait_for(
            handle.execute_update(name, said, result_type=DecisionReply, rpc_timeout=ANSWER),
            ANSWER.total_seconds() + 1,
        )
        return Sent(said, reply, "update")
    except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError):
        pass  # below
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            raise Refused(f"{handle.id} has ended: see `uv run starter.py result {quote(handle.id)}`") from None
        if error.status is RPCStatusCode.FAILED_PRECONDITION:  # as of a paused run
            why = f"the server takes no update for the run ({error.message.rstrip('.')})", "the run goes on"
        elif error.status is not RPCStatusCode.DEADLINE_EXCEEDED:
            raise
    except WorkflowUpdateFailedError as error:
        raise Refused(f"{handle.id} ended before it answered: {error.cause or error}") from None
    await handle.signal(name, said)
    kept = f"{why[0]}, so {what} was sent as a signal: the run reads it when {why[1]}"
    return Sent(said, DecisionReply(accepted=True, message=kept), "signal")


async def cancel(workflow_id: str, as_json: bool) -> int:
    """Requests a run's cancellation; the run then undoes its effects."""
    client = await connect()
    known = await find_running(client, workflow_id)
    await known.handle.cancel()
    if as_json:
        print_json({"workflow_id": workflow_id, "cancel_requested": True})
    elif words := known.paused_words:
        out.print(f"asked to cancel; the run is {words}", markup=False)
    else:
        out.print(f"asked to cancel; the run undoes what it did: uv run starter.py follow {quote(workflow_id)}")
    return 0
