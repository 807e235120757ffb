"""`starter.py breakers`: lists the circuit breakers in the store, and trips and resets them by hand."""

from __future__ import annotations

import asyncio
import getpass
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.output import Refused, out, print_json, seconds

if TYPE_CHECKING:
    from holdfast.reliability.breaker import Breaker, Row
    from holdfast.state.clock import StoreClock

commands = typer.Typer(help="List the circuit breakers; trip and reset them by hand.", no_args_is_help=False)

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs")]
Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="a service, service@tenant or model, as `breakers` lists it")
]
By = Annotated[str, typer.Option("--by", metavar="NAME", help="who does it (default: the user of this machine)")]


@commands.callback(invoke_without_command=True)
def listing(context: typer.Context, json: Json = False) -> None:
    """List the circuit breakers; trip and reset them by hand."""
    if context.invoked_subcommand is None:
        asyncio.run(_list(json))


@commands.command("list")
def list_breakers(json: Json = False) -> None:
    """List the circuit breakers of all services that ever failed."""
    asyncio.run(_list(json))


@commands.command()
def trip(
    target: Target,
    why: Annotated[str, typer.Option("--why", help="why; runs that wait for the service show it")],
    by: By = "",
    json: Json = False,
) -> None:
    """Open a circuit breaker: no call or probe goes out to the service until a reset."""
    if not why.strip():
        raise Refused("--why is empty: say why, the runs that wait for it show it")
    asyncio.run(_trip(target, why.strip(), by.strip() or getpass.getuser(), json))


@commands.command()
def reset(target: Target, by: By = "", json: Json = False) -> None:
    """Close a circuit breaker, and end a pause that the service asked for: calls go out again."""
    asyncio.run(_reset(target, by.strip() or getpass.getuser(), json))


async def _list(as_json: bool) -> None:
    async with _store() as (breaker, clock):
        rows, now = await breaker.rows(), await clock.now()
    if as_json:
        print_json([asdict(row) for row in rows])
    elif not rows:
        out.print("no breaker has ever counted a failure: all are closed")
    else:
        _show(rows, now)


async def _trip(target: str, why: str, by: str, as_json: bool) -> None:
    from holdfast.authoring.registry import agents
    from holdfast.contracts.wording import did_you_mean

    async with _store() as (breaker, _):
        known = {row.target for row in await breaker.rows()}
        await breaker.trip(target, why, by)
    used = {each.service for spec in agents().values() for each in spec.tools}
    used |= {each.name for spec in agents().values() for each in spec.mcp}
    is_known = target in known or target.partition("@")[0] in used
    if as_json:
        print_json({"target": target, "state": "open", "known": is_known})
        return
    undo = f"uv run starter.py breakers reset {shlex.quote(target)}"
    out.print(f"{target} is tripped: no call goes out to it until `{undo}`", markup=False)
    if not is_known:
        names = sorted(known | used - {"", "model"})
        meant = did_you_mean(target, names)
        words = f"no tool uses {target!r} and it has never failed; there are: {', '.join(names)}{meant}"
        out.print(f"note: {words}", markup=False)


async def _reset(target: str, by: str, as_json: bool) -> None:
    from holdfast.contracts.wording import did_you_mean

    async with _store() as (breaker, _):
        if not await breaker.reset(target, by):
            known = [row.target for row in await breaker.rows()]
            there = f"there are: {', '.join(map(repr, known))}" if known else "there is none yet"
            raise Refused(f"no breaker named {target!r}; {there}{did_you_mean(target, known)}")
    if as_json:
        print_json({"target": target, "state": "closed"})
    else:
        out.print(f"{target} is closed: a run that waits for it calls it within a minute", markup=False)


def _show(rows: list[Row], now: float) -> None:
    from rich.table import Table
    from rich.text import Text

    colours = {"closed": "green", "half-open": "yellow", "open": "red"}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("target", "state", "since", "failures", "next probe", "reason"):
        table.add_column(column, no_wrap=column == "target")
    for row in rows:
        words = f"{row.state}, by hand" if row.held else row.state
        if row.paused_until is not None:
            words += ", paused"
        state = Text(words, colours[row.state])
        since = f"{seconds(max(0.0, now - row.since))} ago" if row.since else ""
        table.add_row(Text(row.target), state, since, str(row.failures), _next(row, now), Text(_reason(row)))
    out.print(table)


def _reason(row: Row) -> str:
    """Why the breaker is open; for a closed one, why it was open last."""
    return f"last: {row.reason}" if row.reason and row.state == "closed" else row.reason


def _next(row: Row, now: float) -> str:
    if row.held:
        return "none until reset"
    if row.state == "half-open":
        return "under way"
    until = row.next_probe or row.paused_until
    if until is None:
        return ""
    return f"in {seconds(until - now)}" if until > now else "with the next call"


@asynccontextmanager
async def _store() -> AsyncIterator[tuple[Breaker, StoreClock]]:
    """The store's breakers and its clock. Raises StoreUnavailable, SchemaMismatch."""
    from holdfast.reliability.breaker import Breaker
    from holdfast.settings import settings
    from holdfast.state.clock import StoreClock
    from holdfast.state.opening import open_database
    from holdfast.state.version import check_schema

    db = await open_database(settings().store_url)
    try:
        await check_schema(db)
        clock = StoreClock(db)
        yield Breaker(db, clock), clock
    finally:
        await db.close()
