"""`starter.py deployments`: the builds of versioned workers, which one takes new runs, which may be stopped."""

from __future__ import annotations

import asyncio
import getpass
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.output import Refused, err, out, print_json, seconds

if TYPE_CHECKING:
    from holdfast.engine.deployments import Deployment

commands = typer.Typer(help="List the builds of versioned workers; choose which one takes new runs.")

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs")]
BuildId = Annotated[str, typer.Argument(metavar="BUILD", help="a build, as `deployments` lists it")]


@commands.callback(invoke_without_command=True)
def listing(context: typer.Context, json: Json = False) -> None:
    """List the builds of versioned workers. Exit status 1 when runs of one of them cannot go on."""
    if context.invoked_subcommand is None:
        raise typer.Exit(asyncio.run(_list(json)))


@commands.command()
def promote(
    build: BuildId,
    percent: Annotated[
        float | None,
        typer.Option("--percent", metavar="N", min=0, max=100, help="the percentage of new runs; 0: none any more"),
    ] = None,
    json: Json = False,
) -> None:
    """Send new runs to a build. Runs under way stay on theirs; name an older build to go back."""
    raise typer.Exit(asyncio.run(_promote(build, percent, json)))


@commands.command()
def drained(build: BuildId, json: Json = False) -> None:
    """Check whether the workers of a build may be stopped for good: exit status 0 for yes, 1 for not yet."""
    raise typer.Exit(asyncio.run(_drained(build, json)))


async def _describe() -> Deployment:
    from holdfast.engine.client import connect
    from holdfast.engine.deployments import DeploymentError, describe
    from holdfast.settings import settings

    name = settings().deployment
    if not name:
        raise Refused("HOLDFAST_DEPLOYMENT is not set: workers are not versioned, so any worker takes any run")
    try:
        return await describe(await connect(), name)
    except DeploymentError as error:
        raise Refused(str(error)) from None


async def _list(as_json: bool) -> int:
    from rich.table import Table

    deployment = await _describe()
    troubles = deployment.troubles
    if as_json:
        print_json({**asdict(deployment), "current": deployment.current, "troubles": troubles})
        return 1 if troubles else 0
    table = Table(box=None, pad_edge=False)
    for head in ("build", "state", "new runs", "open runs", "workers", "waiting tasks", "workers may go"):
        table.add_column(head)
    for build in deployment.builds:
        waiting = f"{build.backlog}, {seconds(build.waiting_s)}" if build.backlog else "–"
        share = f"{build.percent:g} %" if build.percent else "–"
        go = "yes" if build.may_go else "no"
        table.add_row(build.build, build.state, share, str(build.open_runs), str(build.workers), waiting, go)
    out.print(table)
    for each in troubles:
        err.print(f"[yellow]{each}[/yellow]")
    return 1 if troubles else 0


async def _promote(build: str, percent: float | None, as_json: bool) -> int:
    from holdfast.engine.client import connect
    from holdfast.engine.deployments import DeploymentError, promote, without_versions
    from holdfast.settings import settings

    before = await _describe()
    try:
        await promote(await connect(), settings().deployment, build, percent, getpass.getuser())
    except DeploymentError as error:
        raise Refused(str(error)) from None
    if as_json:
        print_json({"build": build, "percent": 100.0 if percent is None else percent, "before": before.current})
    elif percent is None:
        way = (
            f"uv run starter.py deployments promote {before.current}"
            if before.current
            else without_versions(before.name)
        )
        out.print(f"new runs go to build {build}; those under way stay where they are; back: `{way}`", markup=False)
    else:
        rest = before.current or "unversioned workers"
        out.print(f"{percent:g} % of new runs go to build {build}, the others to {rest}", markup=False)
    return 0


async def _drained(build: str, as_json: bool) -> int:
    from holdfast.contracts.wording import did_you_mean

    deployment = await _describe()
    found = next((each for each in deployment.builds if each.build == build), None)
    if found is None:
        builds = [each.build for each in deployment.builds]
        meant = did_you_mean(build, builds)
        raise Refused(f"there is no build {build!r} of {deployment.name}; there are: {', '.join(builds)}{meant}")
    if as_json:
        print_json({**asdict(found), "may_go": found.may_go})
    else:
        what = "its workers may go" if found.may_go else "its workers are needed"
        out.print(f"build {build} is {found.state}, {found.open_runs} runs open: {what}")
    return 0 if found.may_go else 1
