"""`starter.py claims`: large payloads in the store, and clearing away those that no run can need any more."""

from __future__ import annotations

from datetime import UTC, datetime

from holdfast.cli.output import Refused, out, print_json
from holdfast.settings import settings
from holdfast.state.claims import Claims
from holdfast.state.database import open_database
from holdfast.state.version import check_schema
from holdfast.temporal import connect

MARGIN_S = 3600.0
"""A payload is stored before the run starts that it belongs to, and two clocks may disagree."""


async def claims(older_than_days: float, drop: bool, as_json: bool) -> int:
    """Counts, or deletes. Raises Refused while the server knows a run from before that age: it may need them."""
    client = await connect()
    db = await open_database(settings().store_url)
    try:
        await check_schema(db)
        kept = Claims(db)
        cutoff = await db.time() - older_than_days * 86_400
        since = datetime.fromtimestamp(cutoff, UTC)
        runs = (await client.count_workflows(f'StartTime < "{since:%Y-%m-%dT%H:%M:%SZ}"')).count
        if drop and runs:
            raise Refused(
                f"the server still knows {runs} workflows that began before {since:%Y-%m-%d}, open ones or within "
                "retention, and their histories may refer to what is that old: take a greater --older-than"
            )
        number, size = await kept.size(client.namespace)
        old, old_size = await kept.size(client.namespace, cutoff - MARGIN_S)
        dropped = await kept.drop(client.namespace, cutoff - MARGIN_S) if drop else 0
    finally:
        await db.close()
    if as_json:
        found = {"claims": number, "bytes": size, "old": old, "old_bytes": old_size}
        print_json({**found, "workflows_from_before": runs, "dropped": dropped})
    else:
        out.print(f"{number} large payloads of namespace {client.namespace}, {size / 1e6:.1f} MB")
        out.print(f"{old} of them, {old_size / 1e6:.1f} MB, not stored again since {since:%Y-%m-%d %H:%M} UTC")
        out.print(f"dropped {dropped}" if drop else f"workflows from before that the server knows: {runs}")
    return 0
