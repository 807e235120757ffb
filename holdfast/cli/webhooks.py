"""`starter.py webhooks`: tests whether the receiver accepts signed events."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Annotated

import typer

from holdfast.cli.output import Refused, out, print_json

commands = typer.Typer(help="Test whether the receiver of webhooks accepts signed events.", no_args_is_help=True)

LIMIT_S = 10.0


@commands.callback()
def _group() -> None:
    """Keeps `test` a subcommand: Typer would merge a group with only one command."""


@commands.command()
def test(
    url: Annotated[str, typer.Argument(metavar="[URL]", help="without it, HOLDFAST_WEBHOOK_URL")] = "",
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs")] = False,
) -> None:
    """Send a signed event of type `webhook.test` from here and print the response.

    Exit status 1 when the receiver does not accept it.
    """
    raise typer.Exit(asyncio.run(_test(url, json)))


async def _test(url: str, as_json: bool) -> int:
    import httpx2

    from holdfast.contracts.webhooks import payload
    from holdfast.engine.webhooks import TEST, BadAddress, host_of, new_id, post
    from holdfast.reliability.errors import classify
    from holdfast.settings import settings

    url, secrets = url or settings().webhook_url, settings().webhook_secrets
    if not url:
        raise Refused("name an address, or set HOLDFAST_WEBHOOK_URL")
    if not secrets:
        raise Refused("there is no secret to sign with: set HOLDFAST_WEBHOOK_SECRET (`whsec_` and base64)")
    try:
        host_of(url, settings().webhook_hosts)
    except BadAddress as bad:
        raise Refused(str(bad)) from None
    id, begun = new_id(), time.monotonic()
    body = payload(TEST, datetime.now(UTC), {})
    try:
        # A limit for the whole request: the client's own limit restarts with each byte of the response.
        async with asyncio.timeout(LIMIT_S), httpx2.AsyncClient(timeout=LIMIT_S) as http:
            said, taken = f"answered {await post(http, url, id, body, secrets)}", True
    except TimeoutError:
        said, taken = f"no answer within {LIMIT_S:g} s", False
    except httpx2.HTTPError as error:
        said, taken = classify(error).message, False
    took = time.monotonic() - begun
    if as_json:
        print_json({"id": id, "taken": taken, "said": said, "seconds": round(took, 3)})
    else:
        out.print(f"{'✓' if taken else '✗'} {id}: {said} after {took:.2f} s, signed {len(secrets)} times", markup=False)
    return 0 if taken else 1
