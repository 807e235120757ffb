"""A request key is one run for good, and a result stays."""

import asyncio

import pytest

from holdfast.state.database import Database
from holdfast.state.opening import open_database
from holdfast.state.runs import KeyReused, Runs


@pytest.fixture
def runs(db: Database) -> Runs:
    return Runs(db)


async def test_ten_claims_at_once_are_one_run(store_url: str) -> None:
    """Ten clients, each with connections of its own."""
    stores = await asyncio.gather(*(open_database(store_url) for _ in range(10)))
    claims = await asyncio.gather(
        *(Runs(db).claim("k", "wf-k", "discharge", "d1", requested_by=f"user-{n}") for n, db in enumerate(stores))
    )
    assert len(set(claims)) == 1
    assert await Runs(stores[0]).recent(100) == [claims[0]]
    await asyncio.gather(*(db.close() for db in stores))


async def test_a_key_stays_taken_after_the_end(runs: Runs) -> None:
    first = await runs.claim("k", "wf-k", "discharge", "d1", tenant="t", requested_by="r", trace_id="x")
    await runs.mark_started("wf-k")
    await runs.finish("wf-k", "completed", '{"outcome": "completed"}')
    again = await runs.claim("k", "wf-k", "discharge", "d1")
    assert (again.workflow_id, again.tenant, again.requested_by, again.trace_id) == ("wf-k", "t", "r", "x")
    assert again.created_at == first.created_at and again.outcome == "completed"


async def test_a_key_belongs_to_an_agent(runs: Runs) -> None:
    one = await runs.claim("k", "discharge-k", "discharge", "d1")
    other = await runs.claim("k", "billing-k", "billing", "d2")
    assert (one.workflow_id, other.workflow_id) == ("discharge-k", "billing-k")
    await runs.mark_started("billing-k")
    assert await runs.claim("k", "discharge-k", "discharge", "d1") == one  # and not started
    assert {run.agent for run in await runs.of_key("k")} == {"discharge", "billing"}
    # Only the id can still clash, where an agent's name goes on like another's key.
    with pytest.raises(KeyReused, match="'k' leads to the id discharge-k, which a run of agent 'discharge' has"):
        await runs.claim("k", "discharge-k", "dis", "d1")


async def test_a_key_with_another_input_is_refused(runs: Runs) -> None:
    await runs.claim("k", "wf-k", "discharge", "d1")
    with pytest.raises(KeyReused, match=r"'k' belongs to wf-k, which has another input \(digest d1, not d2\)"):
        await runs.claim("k", "wf-k", "discharge", "d2")
    assert [run.input_digest for run in await runs.recent(10)] == ["d1"]


async def test_the_first_start_counts(runs: Runs) -> None:
    assert (await runs.claim("k", "wf-k", "discharge", "d1")).started_at is None
    await runs.mark_started("wf-k")
    started = await runs.get("discharge", "k")
    await runs.mark_started("wf-k")
    assert started is not None and started.started_at is not None and await runs.get("discharge", "k") == started


async def test_the_same_end_again_changes_nothing_and_a_later_end_replaces_it(runs: Runs) -> None:
    await runs.claim("k", "wf-k", "discharge", "d1")
    await runs.finish("wf-k", "failed", '{"n": 1}')
    first = await runs.by_workflow("wf-k")
    await runs.finish("wf-k", "failed", '{"n": 1}')
    assert first is not None and await runs.by_workflow("wf-k") == first
    await runs.finish("wf-k", "completed", '{"n": 2}')  # after a reset
    last = await runs.by_workflow("wf-k")
    assert last is not None and (last.outcome, last.result) == ("completed", '{"n": 2}')
    assert last.ended_at is not None and first.ended_at is not None and last.ended_at > first.ended_at
    assert last.request_key == "k"


async def test_a_run_started_past_the_table_has_a_result_too(runs: Runs) -> None:
    await asyncio.gather(*(runs.finish("by-hand", "completed", "{}", agent="discharge") for _ in range(5)))
    (run,) = await runs.recent(10)
    assert (run.request_key, run.workflow_id, run.agent, run.outcome) == (
        "by-hand",
        "by-hand",
        "discharge",
        "completed",
    )
    # A claim that leads to the same workflow id finds that run instead of failing.
    assert await runs.claim("key", "by-hand", "discharge", "d1") == run


async def test_a_workflow_id_that_is_the_key_of_another_run(runs: Runs) -> None:
    await runs.claim("b", "discharge-b", "discharge", "d1")
    await runs.finish("b", "completed", '{"which": "by hand"}', agent="discharge")
    claimed, by_hand = await runs.get("discharge", "b"), await runs.by_workflow("b")
    assert claimed is not None and claimed.outcome is None
    assert by_hand is not None and by_hand.result == '{"which": "by hand"}'


async def test_recent_is_newest_first_and_limited(runs: Runs) -> None:
    for n in range(5):
        await runs.claim(f"k{n}", f"wf-{n}", "discharge", "d")
    assert [run.request_key for run in await runs.recent(3)] == ["k4", "k3", "k2"]
