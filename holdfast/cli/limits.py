"""`starter.py limits`: the rate limits, their use in the last minute, calls in flight and calls that wait."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from holdfast.cli.output import out, print_json, seconds
from holdfast.reliability.limits import usage
from holdfast.settings import settings
from holdfast.state.clock import StoreClock
from holdfast.state.opening import open_database
from holdfast.state.version import check_schema


async def listing(as_json: bool) -> int:
    """Prints the rate limits. Raises StoreUnavailable, SchemaMismatch."""
    db = await open_database(settings().store_url)
    try:
        await check_schema(db)
        now = await StoreClock(db).now()
        found = await usage(db, now)
    finally:
        await db.close()
    if as_json:
        print_json([asdict(each) for each in found])
        return 0
    if not found:
        out.print("no call has been under a limit yet")
        return 0
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("limit", "requests in the last minute", "tokens", "in flight", "waiting", "the last of them is due"):
        table.add_column(column)
    for each in found:
        due = f"in {seconds(max(each.last_due - now, 0))}" if each.last_due else ""
        table.add_row(each.name, str(each.requests), f"{each.tokens:,}", str(each.in_flight), str(each.waiting), due)
    out.print(table)
    return 0
