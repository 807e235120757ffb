"""The commands of `starter.py`. Each imports what it needs when it runs, so that `--help` stays fast."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Coroutine
from typing import Annotated, Any

import typer
from typer._click.exceptions import NoArgsIsHelpError
from typer.exceptions import TyperException

from holdfast.cli import breakers, webhooks
from holdfast.cli.errors import mendable, nowhere
from holdfast.cli.output import Refused, fail, out, prepare_streams, print_json

RUNS, PEOPLE, RELIABILITY, OPERATIONS, SET_UP = "Runs", "People", "Reliability", "Operations", "Set-up"
"""Panels of `--help`, in the order of their first commands below."""

app = typer.Typer(
    help="Start and follow agents, answer their approvals, and run the embedded stack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(breakers.commands, name="breakers", rich_help_panel=RELIABILITY)
dlq = typer.Typer(help="List, replay and drop dead letters: failed work, kept for a replay.", no_args_is_help=True)
app.add_typer(dlq, name="dlq", rich_help_panel=RELIABILITY)
app.add_typer(webhooks.commands, name="webhooks", rich_help_panel=OPERATIONS)

Run = Annotated[str, typer.Argument(metavar="RUN", help="the run's id, as `run` printed it")]
Approval = Annotated[
    str, typer.Argument(metavar="[APPROVAL_ID]", help="one approval; without it, all that are open now")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs")]
By = Annotated[str, typer.Option("--by", metavar="NAME", help="who decides (default: the user of this machine)")]


@app.command(rich_help_panel=RUNS)
def run(
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="an agent or a batch, as `agents` lists it")],
    input: Annotated[
        str,
        typer.Option("--input", "-i", metavar="JSON|FILE|FOLDER|-", help="the agent's input; - reads it from stdin"),
    ] = "",
    id: Annotated[
        str, typer.Option("--id", metavar="KEY", help="request key: the same agent and key return the same run")
    ] = "",
    webhook: Annotated[
        str, typer.Option("--webhook", metavar="URL", help="address for signed events: input needed, run ended")
    ] = "",
    wait: Annotated[
        bool, typer.Option("--wait", help="wait silently for the end; the exit status reports the outcome")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="like --wait, and show the progress")] = False,
    json: Json = False,
) -> None:
    """Start an agent or a batch, and print the run's id at once.

    Exit status with --wait and --follow: 0 completed, 3 partial, 4 rejected, 1 failed, 5 cancelled.
    """
    if wait and follow:
        raise Refused("--wait and --follow exclude each other: --follow waits too")
    from holdfast.cli import runs

    _go(runs.run(agent, input, id, webhook=webhook, wait=wait, follow_it=follow, as_json=json))


@app.command("list", rich_help_panel=RUNS)
def list_runs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="the most runs to list")] = 20,
    batch: Annotated[str, typer.Option("--batch", metavar="RUN", help="list the runs of this batch's items")] = "",
    json: Json = False,
) -> None:
    """List runs and batches, newest first."""
    from holdfast.cli import runs

    _go(runs.listing(limit, batch, json))


@app.command(rich_help_panel=RUNS)
def status(run: Run, json: Json = False) -> None:
    """Show what a run is doing now."""
    from holdfast.cli import runs

    _go(runs.status(run, json))


@app.command(rich_help_panel=RUNS)
def follow(run: Run, json: Json = False) -> None:
    """Follow a run until it ends; the exit status reports the outcome. Ctrl-C leaves the run going."""
    from holdfast.cli import runs

    async def watch() -> int:
        return await runs.follow(await runs.connect(), run, as_json=json)

    _go(watch())


@app.command(rich_help_panel=RUNS)
def result(run: Run, json: Json = False) -> None:
    """Show how a run ended."""
    from holdfast.cli import runs

    _go(runs.result(run, json))


@app.command(rich_help_panel=RUNS)
def cancel(run: Run, json: Json = False) -> None:
    """Cancel a run; it undoes what it did."""
    from holdfast.cli import runs

    _go(runs.cancel(run, json))


@app.command(rich_help_panel=PEOPLE)
def approvals(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="one run; without it, all")] = None,
    role: Annotated[str, typer.Option("--role", help="only requests to this role, such as pharmacist")] = "",
    json: Json = False,
) -> None:
    """List the open approvals and questions, with the commands that answer them."""
    from holdfast.cli import runs

    _go(runs.approvals(run, role, json))


@app.command(rich_help_panel=PEOPLE)
def approve(
    run: Run,
    approval_id: Approval = "",
    by: By = "",
    comment: Annotated[str, typer.Option("--comment", help="kept with the decision")] = "",
    json: Json = False,
) -> None:
    """Approve one request of a run, or all that are open."""
    _decide(run, approval_id, "approve", by, comment, json)


@app.command(rich_help_panel=PEOPLE)
def reject(
    run: Run,
    reason: Annotated[str, typer.Option("--reason", help="why; the agent reads it")],
    approval_id: Approval = "",
    by: By = "",
    json: Json = False,
) -> None:
    """Reject one request of a run, or all that are open, with a reason."""
    _words("--reason", reason, "say why, the agent acts on it")
    _decide(run, approval_id, "reject", by, reason, json)


def _decide(run: str, approval_id: str, verdict: str, by: str, comment: str, json: bool) -> None:
    from holdfast.cli import runs
    from holdfast.contracts.people import Verdict

    _go(runs.decide(run, approval_id, Verdict(verdict), _name(by), comment, json))


@app.command(rich_help_panel=PEOPLE)
def edit(
    run: Run,
    approval_id: Annotated[
        str, typer.Argument(metavar="[APPROVAL_ID]", help="the approval; required when several are open")
    ] = "",
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="change one argument; VALUE is JSON, else text; repeatable"),
    ] = None,
    arguments: Annotated[str, typer.Option("--arguments", metavar="JSON|FILE|-", help="replace all arguments")] = "",
    comment: Annotated[str, typer.Option("--comment", help="kept with the decision")] = "",
    by: By = "",
    json: Json = False,
) -> None:
    """Approve a tool call with changed arguments. Holdfast validates them and tells the agent."""
    from holdfast.cli import talk

    _go(talk.edit(run, approval_id, set or [], arguments, _name(by), comment, json))


@app.command(rich_help_panel=PEOPLE)
def answer(
    run: Run,
    question: Annotated[str, typer.Argument(metavar="QUESTION_ID", help="as `approvals` lists it, such as q2")],
    text: Annotated[str, typer.Argument(metavar="ANSWER", help="a text, or JSON with --value")],
    value: Annotated[bool, typer.Option("--value", help="the answer is JSON, such as true or [1, 2]")] = False,
    comment: Annotated[str, typer.Option("--comment", help="kept with the answer")] = "",
    by: By = "",
    json: Json = False,
) -> None:
    """Answer a question that an agent asks."""
    from holdfast.cli import talk

    _go(talk.answer(run, question, text, _name(by), comment, value, json))


@app.command(rich_help_panel=PEOPLE)
def message(
    run: Run,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="the message; - reads it from stdin")],
    by: Annotated[
        str, typer.Option("--by", metavar="NAME", help="who sends it (default: the user of this machine)")
    ] = "",
    json: Json = False,
) -> None:
    """Send a message to a running agent. Its next turn reads it; a call in flight is not interrupted."""
    from holdfast.cli import talk

    _go(talk.message(run, text, _name(by), json))


@app.command(rich_help_panel=PEOPLE)
def settle(
    run: Run,
    what: Annotated[str, typer.Argument(metavar="STEP_OR_KEY", help="the step, the tool, or the ledger key")],
    happened: Annotated[
        bool | None, typer.Option("--happened/--did-not", help="it took effect, or a person did it; or it did not")
    ] = None,
    result: Annotated[str, typer.Option("--result", metavar="JSON", help="the call's result, with --happened")] = "",
    comment: Annotated[str, typer.Option("--comment", metavar="WHY", help="kept with the finding")] = "",
    by: By = "",
    json: Json = False,
) -> None:
    """Record how a call ended, when its outcome is unknown or left to a person. Works after the run's end too."""
    if happened is None:
        raise Refused("say which: --happened, or --did-not --comment WHY")
    if happened is False:
        _words("--comment", comment, "--did-not needs it, and it is kept with the finding")
    if result and not happened:
        raise Refused("--result goes with --happened only")
    from holdfast.cli.settle import settle

    _go(settle(run, what, happened=happened, result=result, by=_name(by), comment=comment, as_json=json))


@app.command(rich_help_panel=RELIABILITY)
def limits(json: Json = False) -> None:
    """List the rate limits, their use in the last minute, and how many calls wait."""
    from holdfast.cli import limits as rate_limits

    _go(rate_limits.listing(json))


DeadLetter = Annotated[str, typer.Argument(metavar="LETTER", help="as `dlq list` names it")]
Agent = Annotated[str, typer.Option("--agent", help="only dead letters of this agent")]
ToolName = Annotated[str, typer.Option("--tool", help="only dead letters of this tool")]
Kind = Annotated[str, typer.Option("--kind", metavar="call|undo|run|stuck|hook", help="only dead letters of this kind")]


@dlq.command("list")
def dlq_list(
    agent: Agent = "",
    tool: ToolName = "",
    kind: Kind = "",
    state: Annotated[str, typer.Option("--state", help="open, replaying, replayed, settled or dropped")] = "",
    json: Json = False,
) -> None:
    """List dead letters, oldest first; without --state, only those that are not closed."""
    from holdfast.cli import dead_letters

    _go(dead_letters.listing(dead_letters.Filter(agent, tool, kind, state), json))


@dlq.command("show")
def dlq_show(letter: DeadLetter, json: Json = False) -> None:
    """Show a dead letter: cause, input, failed attempts, ledger keys, and what to do next."""
    from holdfast.cli import dead_letters

    _go(dead_letters.show(letter, json))


@dlq.command("replay")
def dlq_replay(
    letter: Annotated[list[str] | None, typer.Argument(metavar="[LETTER]…", help="which; or a filter")] = None,
    agent: Agent = "",
    tool: ToolName = "",
    kind: Kind = "",
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    by: By = "",
    json: Json = False,
) -> None:
    """Replay dead letters under the same idempotency keys, and wait for the end.

    Exit status 1 when a replay fails.
    """
    from holdfast.cli import dead_letters

    _go(dead_letters.replay(letter or [], dead_letters.Filter(agent, tool, kind), _name(by), yes, json))


@dlq.command("drop")
def dlq_drop(
    letter: Annotated[list[str], typer.Argument(metavar="LETTER…", help="as `dlq list` names them")],
    why: Annotated[str, typer.Option("--why", help="kept with the letter")],
    by: By = "",
    json: Json = False,
) -> None:
    """Close dead letters without a replay."""
    _words("--why", why, "say why nothing is done about it")
    from holdfast.cli import dead_letters

    _go(dead_letters.drop(letter, why, _name(by), json))


@app.command(rich_help_panel=RELIABILITY)
def orphans(
    fix: Annotated[bool, typer.Option("--fix", help="undo their effects now, and record their end")] = False,
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="SECONDS", min=0, max=1e9, help="ignore younger effects")
    ] = 120.0,
    json: Json = False,
) -> None:
    """List runs that ended without undoing their effects, and runs that are stuck.

    Exit status 1 when there are any.
    """
    from holdfast.cli import dead_letters

    _go(dead_letters.orphans(fix, older_than, json))


@app.command(rich_help_panel=OPERATIONS)
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="register search attributes, schedule the sweep")] = False,
    json: Json = False,
) -> None:
    """Check the server, the store, the model and the settings, and say how to fix what is missing.

    Exit status 1 when something is missing that runs need.
    """
    from holdfast.cli.doctor import doctor

    _go(doctor(fix, json))


@app.command(rich_help_panel=OPERATIONS)
def payloads(
    older_than: Annotated[
        float,
        typer.Option("--older-than", metavar="DAYS", min=0, max=36_500, help="payloads not stored again for so long"),
    ] = 90.0,
    drop: Annotated[bool, typer.Option("--drop", help="delete them, unless a run that old is left")] = False,
    json: Json = False,
) -> None:
    """Count the large payloads in the store; with --drop, delete those that no run can need any more."""
    from holdfast.cli import payloads as large

    _go(large.payloads(older_than, drop, json))


@app.command("codec-server", rich_help_panel=OPERATIONS)
def codec_server(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="port to listen at")] = 8234,
    host: Annotated[str, typer.Option("--host", help="address to listen at")] = "127.0.0.1",
    ui: Annotated[
        list[str] | None,
        typer.Option("--ui", metavar="ORIGIN", help="Web UI that may call it (default: HOLDFAST_UI_URL); repeatable"),
    ] = None,
) -> None:
    """Decrypt payloads for the Web UI and `temporal --codec-endpoint`. Clients send HOLDFAST_CODEC_TOKEN."""
    from holdfast.cli.codec import serve

    _go(serve(host, port, ui or []))


@app.command(rich_help_panel=OPERATIONS)
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
    """Serve Holdfast over MCP: clients start runs, follow them and read open approvals.

    Clients can answer approvals only with --decide: an agent must not approve its own work.
    """
    from holdfast.cli import mcp_server

    if decide and not by.strip():
        raise Refused("--decide needs --by NAME: every decision records the name of the person responsible")
    _go(mcp_server.serve(_name(by), decide=decide, host=host, port=http))


@app.command(rich_help_panel=SET_UP)
def up() -> None:
    """Run the embedded stack in the foreground: Temporal with its Web UI, hospital, model, worker. Ctrl-C ends it."""
    from holdfast.cli.up import up

    _go(up())


@app.command(rich_help_panel=SET_UP)
def demo(
    fail: Annotated[
        bool, typer.Option("--fail", help="the patient's message fails permanently, so the run undoes its effects")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="approve without asking")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="leave the stack running until Ctrl-C")] = False,
) -> None:
    """Run one agent through crashes, retries, a hung service and an approval. Needs no API key and no Docker."""
    from holdfast.cli.demo import demo

    _go(demo(fail=fail, yes=yes, keep=keep))


@app.command(rich_help_panel=SET_UP)
def new(
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="its name, such as meetings")],
    repo: Annotated[
        str, typer.Option("--repo", metavar="DIR", help="write a repository of its own, with a Dockerfile, into DIR")
    ] = "",
    holdfast: Annotated[
        str,
        typer.Option(
            "--holdfast",
            metavar="PATH|URL@TAG",
            help="with --repo: where that repository gets Holdfast from, a checkout or git (default: this checkout)",
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Create a working example in agents/AGENT, with a script for the scripted model and a test."""
    from holdfast.cli import new

    if holdfast and not repo:
        raise Refused("--holdfast goes with --repo only")
    if repo:
        new.new_repository(agent, repo, holdfast, json)
    else:
        new.new(agent, json)


@app.command(rich_help_panel=SET_UP)
def agents(json: Json = False) -> None:
    """List the agents and batches, with their input."""
    from holdfast.cli.catalogue import show_agents

    show_agents(json)


@app.command(rich_help_panel=SET_UP)
def tools(
    agent: Annotated[str | None, typer.Argument(metavar="[AGENT]", help="one agent; without it, all")] = None,
    json: Json = False,
) -> None:
    """List the tools: version, effect class, service, limits, and the schema of their arguments."""
    from holdfast.cli.catalogue import show_tools

    show_tools(agent, json)


@app.command(rich_help_panel=SET_UP)
def migrate(json: Json = False) -> None:
    """Migrate the store's schema to the version that this code needs."""
    from holdfast.settings import settings
    from holdfast.state.schema import migrate

    before, after = migrate(settings().store_url)
    if json:
        print_json({"before": before, "after": after})
    elif before == after:
        out.print(f"the store has schema {after} already")
    else:
        out.print(f"the store went from schema {before or 'none'} to {after}")


def _words(option: str, value: str, what_for: str) -> None:
    """Raises Refused unless the option's value has visible characters."""
    from holdfast.contracts import door

    if not door.visible(value):
        raise Refused(f"{option} is empty: {what_for}")
    door.reason(option, value)


def _name(by: str) -> str:
    import getpass

    from holdfast.contracts import door

    return door.name("--by", by) if by else getpass.getuser()


def _go(command: Coroutine[Any, Any, int]) -> None:
    """Runs an async command and exits with the status that it returns."""
    if "temporalio.runtime" in sys.modules:  # only commands that use a server import it
        _only_errors()
    raise typer.Exit(asyncio.run(command))


def _only_errors() -> None:
    """Limits the Temporal client's log to errors; by default it reports each retry on stderr."""
    from temporalio.runtime import LoggingConfig, Runtime, TelemetryConfig, TelemetryFilter

    quiet = LoggingConfig(filter=TelemetryFilter(core_level="ERROR", other_level="ERROR"))
    Runtime.set_default(Runtime(telemetry=TelemetryConfig(logging=quiet)))


def main() -> int:
    """Runs the command line and returns the exit status. Errors that the user can fix are one line and status 2."""
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
        # Typer and rich exit with status 1, which means a failed run, when the reader closes the pipe.
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
    except Exception as error:  # noqa: BLE001 - the last resort; it prints what it catches
        if (message := mendable(error)) is not None:
            fail(message)
            return 2
        traceback.print_exc(file=sys.stderr)
        return 70  # a bug of ours; 1 would read as a failed run
