"""`starter.py payloads`: counts the large payloads in the store and deletes those that no run can need."""

from __future__ import annotations

from datetime import UTC, datetime

from holdfast.cli.output import Refused, out, print_json
from holdfast.engine.client import connect
from holdfast.settings import settings
from holdfast.state.opening import open_database
from holdfast.state.payloads import StoredPayloads
from holdfast.state.version import check_schema

MARGIN_S = 3600.0
"""Safety margin: a payload is stored before its run starts, and the two clocks may differ."""


async def payloads(older_than_days: float, drop: bool, as_json: bool) -> int:
    """Counts or deletes payloads. Raises Refused while the server has a run of that age, which may need them."""
    client = await connect()
    db = await open_database(settings().store_url)
    try:
        await check_schema(db)
        kept = StoredPayloads(db)
        cutoff = await db.time() - older_than_days * 86_400
        since = datetime.fromtimestamp(cutoff, UTC)
        runs = (await client.count_workflows(f'StartTime < "{since:%Y-%m-%dT%H:%M:%SZ}"')).count
        if drop and runs:
            raise Refused(
                f"the server still has {runs} workflows that started before {since:%Y-%m-%d}, open or within "
                "retention, and their histories may refer to payloads of that age: take a greater --older-than"
            )
        number, size = await kept.size(client.namespace)
        old, old_size = await kept.size(client.namespace, cutoff - MARGIN_S)
        dropped = await kept.drop(client.namespace, cutoff - MARGIN_S) if drop else 0
    finally:
        await db.close()
    if as_json:
        found = {"payloads": number, "bytes": size, "old": old, "old_bytes": old_size}
        print_json({**found, "workflows_from_before": runs, "dropped": dropped})
    else:
        out.print(f"{number} large payloads of namespace {client.namespace}, {size / 1e6:.1f} MB")
        out.print(f"{old} of them, {old_size / 1e6:.1f} MB, not stored again since {since:%Y-%m-%d %H:%M} UTC")
        out.print(f"dropped {dropped}" if drop else f"workflows on the server that started before then: {runs}")
    return 0
