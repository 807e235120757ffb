"""The commands of `starter.py`. Each imports what it needs when it runs, so that `--help` is there at once."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Coroutine
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from holdfast.cli import breakers
from holdfast.cli.output import Refused, fail, out, print_json

app = typer.Typer(
    help="Starts agents, follows them, answers what they ask, and runs the embedded stack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(breakers.commands, name="breakers")

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
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="see `starter.py agents`")],
    input: Annotated[str, typer.Option("--input", "-i", metavar="JSON|FILE|-", help="what the agent works on")] = "",
    id: Annotated[
        str, typer.Option("--id", metavar="KEY", help="request key: the same one again is the same run")
    ] = "",
    wait: Annotated[
        bool, typer.Option("--wait", help="wait silently for the end; the exit status is the outcome's")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="like --wait, showing what happens")] = False,
    json: Json = False,
) -> None:
    """Start an agent; prints the run's id at once.

    Exit status with --wait and --follow: 0 completed, 3 partial, 4 rejected, 1 failed, 5 cancelled.
    """
    if wait and follow:
        raise Refused("--wait and --follow exclude each other: --follow waits too")
    from holdfast.cli import runs

    _go(runs.run(agent, input, id, wait=wait, follow_it=follow, as_json=json))


@app.command("list")
def list_runs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="at most so many")] = 20, json: Json = False
) -> None:
    """List runs, newest first."""
    from holdfast.cli import runs

    _go(runs.listing(limit, json))


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
    json: Json = False,
) -> None:
    """List what waits for a human, with the command that answers it."""
    from holdfast.cli import runs

    _go(runs.approvals(run, json))


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
    if not reason.strip():
        raise Refused("--reason is empty: say why, the agent acts on it")
    _decide(run, approval_id, "reject", by, reason, json)


def _decide(run: str, approval_id: str, verdict: str, by: str, comment: str, json: bool) -> None:
    import getpass

    from holdfast.cli import runs
    from holdfast.contracts import Verdict

    _go(runs.decide(run, approval_id, Verdict(verdict), by.strip() or getpass.getuser(), comment, json))


@app.command()
def cancel(run: Run, json: Json = False) -> None:
    """Ask a run to stop; it undoes what it did."""
    from holdfast.cli import runs

    _go(runs.cancel(run, json))


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
    fix: Annotated[bool, typer.Option("--fix", help="register missing search attributes")] = False, json: Json = False
) -> None:
    """Check what is reachable, what is missing, and say what to do. Exit status 1 when something is missing."""
    from holdfast.cli.doctor import doctor

    _go(doctor(fix, json))


def _go(command: Coroutine[Any, Any, int]) -> None:
    """Runs an async command; its result is the exit status."""
    raise typer.Exit(asyncio.run(command))


def main() -> int:
    """Runs the command line; the exit status. Errors that a user can mend are one line and status 2."""
    try:
        return app(standalone_mode=False) or 0
    except KeyboardInterrupt:
        return 130
    except TyperException as error:
        fail(f"{getattr(error, 'format_message', error.__str__)()} (see `uv run starter.py --help`)")
        return 2
    except Exception as error:  # noqa: BLE001 - the last resort, and nothing is swallowed
        if (message := mendable(error)) is not None:
            fail(message)
            return 2
        traceback.print_exc(file=sys.stderr)
        return 70  # a bug of ours; 1 would read as a failed run


def mendable(error: Exception) -> str | None:
    """The line for an error that a user can do something about; None for a bug. Imports late: errors are rare."""
    if isinstance(error, Refused):
        return str(error)
    from pydantic import ValidationError
    from temporalio.service import RPCError

    from agents.registry import UnknownAgent
    from holdfast.stack import StackFailed
    from holdfast.starting import BadRequest
    from holdfast.state.database import StoreUnavailable
    from holdfast.state.runs import KeyReused
    from holdfast.state.version import SchemaMismatch
    from holdfast.temporal import NoServer
    from holdfast.tools import explain

    if isinstance(
        error, UnknownAgent | BadRequest | KeyReused | StackFailed | StoreUnavailable | SchemaMismatch | NoServer
    ):
        return str(error)
    if isinstance(error, RPCError):
        return (
            f"the Temporal server answered {error.status.name.lower()}: {error.message}; see `uv run starter.py doctor`"
        )
    if isinstance(error, ValidationError) and error.title == "Settings":
        return f"an environment variable does not fit: {explain(error)}"
    return None
