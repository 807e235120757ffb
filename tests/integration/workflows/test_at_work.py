"""A service slower than the time-out: it says "no" because it is still at work, and then does what it was asked.

The messages of the real simulated hospital ignore keys, so a request that is sent twice is a message sent twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest

from holdfast.authoring.tools import Tool, ToolContext, Undo, tool
from holdfast.contracts.profile import Effect
from holdfast.contracts.run import RunOutcome, RunStatus
from holdfast.contracts.tool_call import UndoStatus
from holdfast.dev.simulation.hospital import HospitalRecord
from holdfast.recovery.dead_letters import DeadLetters, LetterKind
from holdfast.reliability.ledger import State
from holdfast.testing.model import call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, cancelled, until
from tests.fixtures.services import Running, service
from tests.fixtures.world import World, agent

SEND = ("send", {"text": "hello"})


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with service("hospital", tmp_path_factory.mktemp("hospital") / "hospital.db") as running:
        yield running


@pytest.fixture
async def http(hospital: Running) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=hospital.url, timeout=30) as client:
        yield client
        await client.delete("/faults")


def sends(url: str, *, undo: bool = True, **declared: Any) -> Tool:
    """The tool that sends a message, asks what was sent, and retracts it. undo: False: it cannot be retracted."""

    @tool(effect=Effect.PROBE, service="mail", name="send", timeout=1, **declared)
    async def send(ctx: ToolContext, text: str) -> str:
        """Send."""
        body = {"reference": ctx.key, "to": ["ada"], "text": text}
        return (await ctx.http.post(f"{url}/messages", json=body)).raise_for_status().json()["status"]

    async def sent(ctx: ToolContext, key: str) -> list[Any]:
        answer = await ctx.http.get(f"{url}/messages", params={"reference": key})
        return answer.raise_for_status().json()["messages"]

    @send.probe
    async def was_sent(ctx: ToolContext, text: str) -> str | None:
        return "sent" if await sent(ctx, ctx.key) else None

    async def retract(ctx: ToolContext, undo: Undo) -> str | None:
        if not await sent(ctx, undo.key):
            return None
        if not await sent(ctx, ctx.key):
            body = {"reference": ctx.key, "to": ["ada"], "text": "never mind", "retracts": undo.key}
            (await ctx.http.post(f"{url}/messages", json=body)).raise_for_status()
        return "retracted"

    if undo:
        send.undo(retract)
    return send


async def slow(http: httpx2.AsyncClient, seconds: float, times: int = 1) -> None:
    fault = {"mode": "slow", "seconds": seconds, "times": times, "method": "POST"}
    (await http.put("/faults/messages", json=fault)).raise_for_status()


def kinds(hospital: Running, base: str) -> list[str]:
    """What the hospital did for this run."""
    return [effect.kind for effect in HospitalRecord(hospital.db).effects(f"{base}/")]


async def at_rest(hospital: Running, base: str) -> list[str]:
    """What the hospital did for this run, once it has come to the end of every request to send something."""
    async with asyncio.timeout(PATIENCE_S):
        while any(r.status is None for r in HospitalRecord(hospital.db).requests(f"{base}/") if r.method == "POST"):
            await asyncio.sleep(0.02)
    return kinds(hospital, base)


async def asked_again(handle: Any) -> RunStatus:
    """The run when the service has said no and may still be at work; or at its end, if it believes that."""
    return await until(handle, lambda s: s.outcome is not None or any("be processing" in note for note in s.notes))


async def landed(hospital: Running, base: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not kinds(hospital, base):
            await asyncio.sleep(0.02)


async def test_it_is_asked_until_it_cannot_be_at_work_and_gets_no_second_request(
    stage: Stage, hospital: Running, http: httpx2.AsyncClient
) -> None:
    await slow(http, 3)
    stage.model.script = sequence(call(SEND), say("done"))
    async with stage.worker():
        handle = await stage.start(agent(sends(hospital.url, settles_within=15)))
        now = await asked_again(handle)
        early = kinds(hospital, now.key_base)
        result = await handle.result()
    assert await at_rest(hospital, result.key_base) == ["message"]
    assert (early, result.outcome, result.failures) == ([], RunOutcome.COMPLETED, 1)


async def test_what_never_came_to_an_effect_is_sent_again_after_that(
    lite: Stage, hospital: Running, http: httpx2.AsyncClient
) -> None:
    (await http.put("/faults/messages", json={"mode": "hang", "times": 1, "method": "POST"})).raise_for_status()
    lite.model.script = sequence(call(SEND), say("done"))
    async with lite.worker():
        result = await (await lite.start(agent(sends(hospital.url, settles_within=3)))).result()
    assert result.outcome is RunOutcome.COMPLETED
    sent = [r for r in HospitalRecord(hospital.db).requests(f"{result.key_base}/") if r.method == "POST"]
    assert kinds(hospital, result.key_base) == ["message"]
    assert len(sent) == 2
    assert sent[1].at - sent[0].at >= 3


async def test_without_a_bound_a_person_is_asked(lite: Stage, hospital: Running, http: httpx2.AsyncClient) -> None:
    await slow(http, 3)
    lite.model.script = sequence(call(SEND), say("done"))
    async with lite.worker():
        handle = await lite.start(agent(sends(hospital.url)))
        now = await until(handle, lambda s: bool(s.approvals))
        (asked,) = now.approvals
        assert (asked.kind, "settles_within" in asked.why) == ("outcome", True)
        await landed(hospital, now.key_base)
        await handle.signal("decide", {"approval_id": asked.id, "verdict": "happened", "approver": "ada"})
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert kinds(hospital, result.key_base) == ["message"]


async def test_cancelled_while_it_is_at_work_the_undo_waits_for_what_it_has_to_undo(
    stage: Stage, hospital: Running, http: httpx2.AsyncClient
) -> None:
    await slow(http, 4)
    stage.model.script = sequence(call(SEND), say("done"))
    async with stage.worker():
        handle = await stage.start(agent(sends(hospital.url, settles_within=5)))
        now = await asked_again(handle)
        assert (now.outcome, kinds(hospital, now.key_base)) == (None, [])
        await handle.cancel()
        await cancelled(handle)
    stored = await stage.stored(handle)
    assert [undo.status for undo in stored.undone] == [UndoStatus.UNDONE]
    assert kinds(hospital, stored.key_base) == ["message", "retraction"]


async def test_cancelled_while_it_is_at_work_the_run_knows_at_its_end_that_it_was_sent(
    stage: Stage, hospital: Running, http: httpx2.AsyncClient
) -> None:
    """Nothing undoes it, so its service is asked, and its no is not believed there either."""
    await slow(http, 4)
    stage.model.script = sequence(call(SEND), say("done"))
    async with stage.worker():
        handle = await stage.start(agent(sends(hospital.url, undo=False, settles_within=15)))
        now = await asked_again(handle)
        assert (now.outcome, kinds(hospital, now.key_base)) == (None, [])
        await handle.cancel()
        await cancelled(handle)
    stored = await stage.stored(handle)
    assert await at_rest(hospital, stored.key_base) == ["message"]
    assert [each.tool for each in stored.stands] == ["send"]
    assert (stored.pending, await DeadLetters(stage.runtime.db).find()) == ([], [])


async def test_an_undo_that_finds_nothing_settles_nothing_without_a_bound(
    lite: Stage, hospital: Running, http: httpx2.AsyncClient
) -> None:
    await slow(http, 4)
    lite.model.script = sequence(call(SEND), say("done"))
    async with lite.worker():
        handle = await lite.start(agent(sends(hospital.url)))
        await until(handle, lambda s: bool(s.approvals))
        await handle.cancel()
        await cancelled(handle)
        stored = await lite.stored(handle)
        (letter,) = [each for each in await DeadLetters(lite.runtime.db).find() if each.kind == LetterKind.UNDO]
        assert [u.status for u in stored.undone] == [UndoStatus.FAILED]
        assert "settles_within" in letter.cause
        await landed(hospital, stored.key_base)


async def test_a_slow_retraction_is_not_sent_twice(lite: Stage, hospital: Running, http: httpx2.AsyncClient) -> None:
    """The undo looks before it acts, and does not see what its first request still does."""
    lite.model.script = sequence(call(SEND), call(("wait", {})))
    async with lite.worker():
        spec = agent(sends(hospital.url, settles_within=8), World().tool("wait", approval=True))
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        await slow(http, 3)
        await handle.cancel()
        await cancelled(handle)
    stored = await lite.stored(handle)
    assert kinds(hospital, stored.key_base) == ["message", "retraction"]
    (row,) = [e for e in await lite.runtime.ledger.entries(stored.key_base) if e.key.endswith("/1")]
    assert row.state is State.COMPENSATED


def test_a_bound_that_is_none_is_refused_where_it_is_declared() -> None:
    for bad in (-1, float("nan"), 1e9):
        with pytest.raises(TypeError, match="settles_within"):
            sends("", settles_within=bad)
    with pytest.raises(TypeError, match="a read has no effect"):
        World().tool("look", Effect.READ, settles_within=3)
