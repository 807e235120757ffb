"""The commands of `starter.py`. Each imports what it needs when it runs, so that `--help` is there at once."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import traceback
from collections.abc import Coroutine
from typing import Annotated, Any

import typer
from typer._click.exceptions import NoArgsIsHelpError
from typer.exceptions import TyperException

from holdfast.cli import breakers, deployments, webhooks
from holdfast.cli.output import Refused, fail, out, prepare_streams, print_json

app = typer.Typer(
    help="Starts agents, follows them, answers what they ask, and runs the embedded stack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(breakers.commands, name="breakers")
app.add_typer(deployments.commands, name="deployments")
dlq = typer.Typer(
    help="Dead letters: what could not be processed, kept with all that a replay needs.", no_args_is_help=True
)
app.add_typer(dlq, name="dlq")
app.add_typer(webhooks.commands, name="webhooks")

Run = Annotated[str, typer.Argument(metavar="RUN", help="the run's id, as `run` printed it")]
Approval = Annotated[
    str, typer.Argument(metavar="[APPROVAL_ID]", help="one approval; without it, all that are open now")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs")]
By = Annotated[str, typer.Option("--by", metavar="NAME", help="who decides (default: the user of this machine)")]


@app.command()
def up() -> None:
    """Run the embedded stack in the foreground: Temporal with its Web UI, hospital, model, worker. Ctrl-C ends it."""
    from holdfast.cli.up import up

    _go(up())


@app.command()
def demo(
    fail: Annotated[
        bool, typer.Option("--fail", help="the patient's message fails for good: watch it being undone")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="approve without asking")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="leave the stack up until Ctrl-C")] = False,
) -> None:
    """Show the whole story in a minute: kills, retries, a hung pharmacy, an approval. No API key, no Docker."""
    from holdfast.cli.demo import demo

    _go(demo(fail=fail, yes=yes, keep=keep))


@app.command()
def run(
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="an agent or a batch: see `starter.py agents`")],
    input: Annotated[str, typer.Option("--input", "-i", metavar="JSON|FILE|FOLDER|-", help="what it works on")] = "",
    id: Annotated[
        str, typer.Option("--id", metavar="KEY", help="request key: the same one again is the same run of this agent")
    ] = "",
    webhook: Annotated[
        str, typer.Option("--webhook", metavar="URL", help="is told, signed, when the run needs input and when it ends")
    ] = "",
    wait: Annotated[
        bool, typer.Option("--wait", help="wait silently for the end; the exit status is the outcome's")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="like --wait, showing what happens")] = False,
    json: Json = False,
) -> None:
    """Start an agent, or a batch of many; prints the run's id at once.

    Exit status with --wait and --follow: 0 completed, 3 partial, 4 rejected, 1 failed, 5 cancelled.
    """
    if wait and follow:
        raise Refused("--wait and --follow exclude each other: --follow waits too")
    from holdfast.cli import runs

    _go(runs.run(agent, input, id, webhook=webhook, wait=wait, follow_it=follow, as_json=json))


@app.command("list")
def list_runs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="at most so many")] = 20,
    batch: Annotated[str, typer.Option("--batch", metavar="RUN", help="the runs of this batch's items")] = "",
    json: Json = False,
) -> None:
    """List runs and batches, newest first."""
    from holdfast.cli import runs

    _go(runs.listing(limit, batch, json))


@app.command()
def status(run: Run, json: Json = False) -> None:
    """Show what a run is doing now."""
    from holdfast.cli import runs

    _go(runs.status(run, json))


@app.command()
def follow(run: Run, json: Json = False) -> None:
    """Watch a run until it ends; the exit status is the outcome's. Ctrl-C leaves it going."""
    from holdfast.cli import runs

    async def watch() -> int:
        return await runs.follow(await runs.connect(), run, as_json=json)

    _go(watch())


@app.command()
def result(run: Run, json: Json = False) -> None:
    """Show how a run ended."""
    from holdfast.cli import runs

    _go(runs.result(run, json))


@app.command()
def approvals(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="one run; without it, all")] = None,
    role: Annotated[str, typer.Option("--role", help="only what is addressed to it, e.g. pharmacist")] = "",
    json: Json = False,
) -> None:
    """List what waits for a human, with the command that answers it."""
    from holdfast.cli import runs

    _go(runs.approvals(run, role, json))


@app.command()
def approve(
    run: Run,
    approval_id: Approval = "",
    by: By = "",
    comment: Annotated[str, typer.Option("--comment", help="kept with the decision")] = "",
    json: Json = False,
) -> None:
    """Say yes to one approval, or to all that are open."""
    _decide(run, approval_id, "approve", by, comment, json)


@app.command()
def reject(
    run: Run,
    reason: Annotated[str, typer.Option("--reason", help="the agent reads it")],
    approval_id: Approval = "",
    by: By = "",
    json: Json = False,
) -> None:
    """Say no to one approval, or to all that are open, with a reason."""
    _words("--reason", reason, "say why, the agent acts on it")
    _decide(run, approval_id, "reject", by, reason, json)


def _decide(run: str, approval_id: str, verdict: str, by: str, comment: str, json: bool) -> None:
    from holdfast.cli import runs
    from holdfast.contracts import Verdict

    _go(runs.decide(run, approval_id, Verdict(verdict), _name(by), comment, json))


@app.command()
def edit(
    run: Run,
    approval_id: Annotated[
        str, typer.Argument(metavar="[APPROVAL_ID]", help="the approval; needed when several are open")
    ] = "",
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="one argument, JSON or else a text; repeatable"),
    ] = None,
    arguments: Annotated[
        str, typer.Option("--arguments", metavar="JSON|FILE|-", help="all arguments, instead of those asked for")
    ] = "",
    comment: Annotated[str, typer.Option("--comment", help="kept with the decision")] = "",
    by: By = "",
    json: Json = False,
) -> None:
    """Say yes to a call with other arguments. They are checked as the agent's own are; the agent is told."""
    from holdfast.cli import talk

    _go(talk.edit(run, approval_id, set or [], arguments, _name(by), comment, json))


@app.command()
def answer(
    run: Run,
    question: Annotated[str, typer.Argument(metavar="QUESTION_ID", help="as `approvals` lists it, such as q2")],
    text: Annotated[str, typer.Argument(metavar="ANSWER", help="a text, or JSON with --value")],
    value: Annotated[bool, typer.Option("--value", help="the answer is JSON, such as true or [1, 2]")] = False,
    comment: Annotated[str, typer.Option("--comment", help="kept with the answer")] = "",
    by: By = "",
    json: Json = False,
) -> None:
    """Answer what an agent asks."""
    from holdfast.cli import talk

    _go(talk.answer(run, question, text, _name(by), comment, value, json))


@app.command()
def message(
    run: Run,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="what to say; - reads it from stdin")],
    by: Annotated[
        str, typer.Option("--by", metavar="NAME", help="who speaks (default: the user of this machine)")
    ] = "",
    json: Json = False,
) -> None:
    """Say something to a run while it works. Its next turn reads it; a call in flight is not interrupted."""
    from holdfast.cli import talk

    _go(talk.message(run, text, _name(by), json))


@app.command()
def limits(json: Json = False) -> None:
    """List the rate limits: what the last minute has used of them, and who waits."""
    from holdfast.cli import limits as rate_limits

    _go(rate_limits.listing(json))


@app.command()
def cancel(run: Run, json: Json = False) -> None:
    """Ask a run to stop; it undoes what it did."""
    from holdfast.cli import runs

    _go(runs.cancel(run, json))


@app.command()
def settle(
    run: Run,
    what: Annotated[str, typer.Argument(metavar="STEP_OR_KEY", help="the step, the tool, or the ledger key")],
    happened: Annotated[
        bool | None, typer.Option("--happened/--did-not", help="it happened, or somebody did it; or it did not")
    ] = None,
    result: Annotated[str, typer.Option("--result", metavar="JSON", help="the result it had, with --happened")] = "",
    comment: Annotated[str, typer.Option("--comment", metavar="WHY", help="kept with the finding")] = "",
    by: By = "",
    json: Json = False,
) -> None:
    """Say how a call ended that nobody knows the end of, or that was left to a person; also after the run's end."""
    if happened is None:
        raise Refused("say which: --happened, or --did-not --comment WHY")
    if happened is False:
        _words("--comment", comment, "--did-not needs it, and it is kept with the finding")
    if result and not happened:
        raise Refused("--result goes with --happened only")
    from holdfast.cli.settle import settle

    _go(settle(run, what, happened=happened, result=result, by=_name(by), comment=comment, as_json=json))


Letter = Annotated[str, typer.Argument(metavar="LETTER", help="as `dlq list` names it")]
Agent = Annotated[str, typer.Option("--agent", help="only of this agent")]
ToolName = Annotated[str, typer.Option("--tool", help="only of this tool")]
Kind = Annotated[str, typer.Option("--kind", metavar="call|undo|run|stuck|hook", help="only of this kind")]


@dlq.command("list")
def dlq_list(
    agent: Agent = "",
    tool: ToolName = "",
    kind: Kind = "",
    state: Annotated[str, typer.Option("--state", help="open, replaying, replayed, settled or dropped")] = "",
    json: Json = False,
) -> None:
    """List dead letters, the oldest first; without --state those that are not closed."""
    from holdfast.cli import letters

    _go(letters.listing(letters.Filter(agent, tool, kind, state), json))


@dlq.command("show")
def dlq_show(letter: Letter, json: Json = False) -> None:
    """Show one: cause, input, every failed attempt, ledger keys, and what to do next."""
    from holdfast.cli import letters

    _go(letters.show(letter, json))


@dlq.command("replay")
def dlq_replay(
    letter: Annotated[list[str] | None, typer.Argument(metavar="[LETTER]…", help="or a filter")] = None,
    agent: Agent = "",
    tool: ToolName = "",
    kind: Kind = "",
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    by: By = "",
    json: Json = False,
) -> None:
    """Try again, under the same idempotency keys, and wait for it. Exit status 1 when one did not end well."""
    from holdfast.cli import letters

    _go(letters.replay(letter or [], letters.Filter(agent, tool, kind), _name(by), yes, json))


@dlq.command("drop")
def dlq_drop(
    letter: Annotated[list[str], typer.Argument(metavar="LETTER…", help="as `dlq list` names them")],
    why: Annotated[str, typer.Option("--why", help="kept with the letter")],
    by: By = "",
    json: Json = False,
) -> None:
    """Close dead letters without doing anything about them."""
    _words("--why", why, "say why nothing is done about it")
    from holdfast.cli import letters

    _go(letters.drop(letter, why, _name(by), json))


@app.command()
def orphans(
    fix: Annotated[bool, typer.Option("--fix", help="undo what they did now, and record their end")] = False,
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="SECONDS", min=0, max=1e9, help="leave younger effects alone")
    ] = 120.0,
    json: Json = False,
) -> None:
    """List runs that were terminated, or vanished, and left effects behind. Exit status 1 when there are some."""
    from holdfast.cli import letters

    _go(letters.orphans(fix, older_than, json))


def _words(option: str, value: str, what_for: str) -> None:
    """Raises Refused unless it has visible characters."""
    from holdfast import door

    if not door.visible(value):
        raise Refused(f"{option} is empty: {what_for}")
    door.reason(option, value)


def _name(by: str) -> str:
    import getpass

    from holdfast import door

    return door.name("--by", by) if by else getpass.getuser()


@app.command()
def agents(json: Json = False) -> None:
    """List the agents, with what they take as input."""
    from holdfast.cli.catalogue import show_agents

    show_agents(json)


@app.command()
def tools(
    agent: Annotated[str | None, typer.Argument(metavar="[AGENT]", help="one agent; without it, all")] = None,
    json: Json = False,
) -> None:
    """List the tools: version, effect class, service, limits, and the schema of their arguments."""
    from holdfast.cli.catalogue import show_tools

    show_tools(agent, json)


@app.command("codec-server")
def codec_server(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="port to listen at")] = 8234,
    host: Annotated[str, typer.Option("--host", help="address to listen at")] = "127.0.0.1",
    ui: Annotated[
        list[str] | None,
        typer.Option("--ui", metavar="ORIGIN", help="Web UI that may call it (default: HOLDFAST_UI_URL); repeatable"),
    ] = None,
) -> None:
    """Show plain text in the Web UI, and to `temporal --codec-endpoint`, to whoever holds HOLDFAST_CODEC_TOKEN."""
    from holdfast.cli.codec import serve

    _go(serve(host, port, ui or []))


@app.command()
def new(
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="its name, such as meetings")],
    json: Json = False,
) -> None:
    """Write a working agent to begin with: agents/AGENT, with a script for the scripted model and a test."""
    from holdfast.cli.new import new

    new(agent, json)


@app.command()
def claims(
    older_than: Annotated[
        float,
        typer.Option("--older-than", metavar="DAYS", min=0, max=36_500, help="those not stored again for so long"),
    ] = 90.0,
    drop: Annotated[bool, typer.Option("--drop", help="delete them, if no run that old is left")] = False,
    json: Json = False,
) -> None:
    """Count the large payloads in the store, and delete those that no run can need any more."""
    from holdfast.cli import claims as large_payloads

    _go(large_payloads.claims(older_than, drop, json))


@app.command()
def mcp(
    http: Annotated[
        int | None,
        typer.Option("--http", metavar="PORT", min=0, max=65535, help="serve HTTP instead of stdin and stdout"),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="the address to listen at, with --http")] = "127.0.0.1",
    by: Annotated[str, typer.Option("--by", metavar="NAME", help="who starts runs and decides")] = "",
    decide: Annotated[
        bool, typer.Option("--decide/--no-decide", help="let the client answer approvals, in the name of --by")
    ] = False,
) -> None:
    """Serve the platform as an MCP server: start runs, follow them, see what waits for a human.

    Approvals cannot be answered unless you say --decide: an agent must not approve its own work.
    """
    from holdfast.cli import mcp_server

    if decide and not by.strip():
        raise Refused("--decide needs --by NAME: every decision carries the name of whoever answers for it")
    _go(mcp_server.serve(_name(by), decide=decide, host=host, port=http))


@app.command()
def migrate(json: Json = False) -> None:
    """Bring the store's schema to what this code needs."""
    from holdfast.settings import settings
    from holdfast.state.schema import migrate

    before, after = migrate(settings().store_url)
    if json:
        print_json({"before": before, "after": after})
    elif before == after:
        out.print(f"the store has schema {after} already")
    else:
        out.print(f"the store went from schema {before or 'none'} to {after}")


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="register search attributes, schedule the sweep")] = False,
    json: Json = False,
) -> None:
    """Check what is reachable, what is missing, and say what to do. Exit status 1 when something is missing."""
    from holdfast.cli.doctor import doctor

    _go(doctor(fix, json))


def _go(command: Coroutine[Any, Any, int]) -> None:
    """Runs an async command; its result is the exit status."""
    if "temporalio.runtime" in sys.modules:  # imported by what asks a server
        _only_errors()
    raise typer.Exit(asyncio.run(command))


def _only_errors() -> None:
    """Temporal's client tells of each of its retries on stderr otherwise, in a developer's words."""
    from temporalio.runtime import LoggingConfig, Runtime, TelemetryConfig, TelemetryFilter

    quiet = LoggingConfig(filter=TelemetryFilter(core_level="ERROR", other_level="ERROR"))
    Runtime.set_default(Runtime(telemetry=TelemetryConfig(logging=quiet)))


def main() -> int:
    """Runs the command line; the exit status. Errors that a user can mend are one line and status 2."""
    try:
        prepare_streams()
        for given in sys.argv[1:]:
            if not given.isascii() and any("\ud800" <= each <= "\udfff" for each in given):
                raise Refused(f"{given!r} is not text in UTF-8")
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except (BrokenPipeError, SystemExit) as error:
        # Typer and rich end the process with status 1, a failed run's, when the reader has all that it wanted.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        nowhere()
        return 0
    except NoArgsIsHelpError as error:
        print(error.format_message())
        return 0 if error.ctx and error.ctx.parent is None else 2
    except TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path.partition(" ")[2] if context else ""
        see = " ".join(filter(None, ("uv run starter.py", command, "--help")))
        fail(f"{getattr(error, 'format_message', error.__str__)()} (see `{see}`)")
        return 2
    except Exception as error:  # noqa: BLE001 - the last resort, and nothing is swallowed
        if (message := mendable(error)) is not None:
            fail(message)
            return 2
        traceback.print_exc(file=sys.stderr)
        return 70  # a bug of ours; 1 would read as a failed run


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)
"""What writing to a stdout that cannot take it fails with."""


def nowhere() -> None:
    """Lets what is still buffered for stdout go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def mendable(error: Exception) -> str | None:
    """The line for an error that a user can do something about; None for a bug. Imports late: errors are rare."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, OSError) and error.errno and (error.filename is not None or error.errno in NO_ROOM):
        what = f"cannot use {os.fsdecode(error.filename)}" if error.filename is not None else "cannot write the output"
        if error.filename is None:
            nowhere()
        return f"{what}: {error.strerror}"
    from temporalio.service import RPCError

    from agents.registry import BrokenAgent, UnknownAgent
    from holdfast import door
    from holdfast.claims import ClaimLost
    from holdfast.codec import PayloadUnreadable
    from holdfast.settings import BadProfile, BadStackFile, settings, unfit
    from holdfast.stack import StackFailed
    from holdfast.starting import BadRequest
    from holdfast.state.database import StoreUnavailable
    from holdfast.state.runs import KeyReused
    from holdfast.state.version import SchemaMismatch
    from holdfast.temporal import NoServer

    if isinstance(
        error,
        UnknownAgent
        | BadProfile
        | BadRequest
        | BadStackFile
        | BrokenAgent
        | ClaimLost
        | KeyReused
        | NoServer
        | PayloadUnreadable
        | SchemaMismatch
        | StackFailed
        | StoreUnavailable
        | door.Unfit,
    ):
        lacks = {StoreUnavailable: "DATABASE_URL", PayloadUnreadable: "HOLDFAST_ENCRYPTION_KEYS"}.get(type(error))
        return "; ".join(filter(None, (str(error), lacks and settings().kept_by_the_stack(lacks))))
    if isinstance(error, RPCError):
        return (
            f"the Temporal server answered {error.status.name.lower()}: {error.message}; see `uv run starter.py doctor`"
        )
    return unfit(error)
