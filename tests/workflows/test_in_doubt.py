"""A run that is unwound while a call is in doubt: its service is asked; what stays in doubt becomes a dead letter."""

from __future__ import annotations

import asyncio
from typing import Any

from holdfast.contracts import Effect, StepSpec
from holdfast.reliability.ledger import State
from holdfast.state.letters import Letter, LetterKind, Letters
from holdfast.tools import ToolFailed
from tests.fixtures.model import call, say, sequence
from tests.fixtures.temporal import Stage, cancelled, failure, until
from tests.fixtures.world import World, agent


async def letters(stage: Stage) -> list[Letter]:
    return await Letters(stage.runtime.db).find()


async def test_beside_a_tool_of_its_step_that_was_undone(stage: Stage) -> None:
    """The step counts as undone, and that says nothing of its other tool."""
    world, never = World(), asyncio.Event()
    mail = world.tool("mail", Effect.MANUAL, gate=never, undo=None, timeout=0.2)
    steps = [StepSpec(name="notify", tools=["book", "mail"], role="desk", critical=False)]
    stage.model.script = sequence(call(("book", {}), ("mail", {})), call(("send", {})))
    async with stage.worker():
        handle = await stage.start(agent(world.tool("book"), mail, world.tool("send", approval=True), steps=steps))
        await until(handle, lambda s: any(a.subject == "send" for a in s.approvals))
        await handle.cancel()
        await cancelled(handle)
        told = await handle.query("result")
    stored = await stage.stored(handle)
    assert [(p.key, p.role) for p in stored.pending] == [(f"{stored.key_base}/2", "desk")]
    assert told["pending"] == [p.model_dump(exclude_defaults=True) for p in stored.pending]
    (letter,) = await letters(stage)
    assert (letter.kind, letter.key, letter.subject, letter.role) == (
        LetterKind.CALL,
        f"{stored.key_base}/2",
        "mail",
        "desk",
    )


async def test_of_two_calls_of_a_tool_the_one_that_the_other_hides(lite: Stage) -> None:
    world, never = World(), asyncio.Event()
    mail = world.tool("mail", Effect.MANUAL, undo=None, errors=[ConnectionResetError("in the middle")])
    fails = world.tool("fails", gate=never, timeout=0.5, retries=0, errors=[ToolFailed("no")])
    lite.model.script = sequence(call(("mail", {"n": 1}), ("mail", {"n": 2})), call(("fails", {})))
    never.set()
    async with lite.worker():
        result = await failure(await lite.start(agent(mail, fails)))
    rows = {e.key: e.state for e in await lite.runtime.ledger.entries(result.key_base) if e.name == "mail"}
    (doubtful,) = [key for key, state in rows.items() if state is State.UNKNOWN]
    assert [p.key for p in result.pending if p.key == doubtful] == [doubtful]
    assert [each.key for each in await letters(lite) if each.kind == LetterKind.CALL] == [doubtful]


async def cancelled_while_it_is_asked_again(stage: Stage, world: World, finds: list[str], bound: float) -> Any:
    """The stored result of a run that is cancelled while a call waits until its service's no counts."""
    ping = world.tool("ping", Effect.PROBE, gate=asyncio.Event(), undo=None, timeout=0.5, settles_within=bound)

    @ping.probe
    async def asked(ctx: Any, n: int) -> str | None:
        world.log.append("asked ping")
        return finds[0] if finds else None

    stage.model.script = sequence(call(("ping", {})), say("done"))
    async with stage.worker():
        handle = await stage.start(agent(ping))
        await until(handle, lambda s: any("may still be at work" in note for note in s.notes))
        if bound > 30:
            finds.append("pong")
        await handle.cancel()
        await cancelled(handle)
    return await stage.stored(handle)


async def test_its_service_says_that_it_happened(stage: Stage) -> None:
    stored = await cancelled_while_it_is_asked_again(stage, World(), [], bound=600)
    assert stored.pending == []
    assert [each.tool for each in stored.stands] == ["ping"]
    assert await letters(stage) == []
    rows = [e.state for e in await stage.runtime.ledger.entries(stored.key_base) if e.name == "ping"]
    assert rows == [State.DONE]


async def test_its_service_says_that_it_did_not_happen_once_that_counts(lite: Stage) -> None:
    stored = await cancelled_while_it_is_asked_again(lite, World(), [], bound=4)
    assert (stored.pending, stored.stands, await letters(lite)) == ([], [], [])
    rows = [e.state for e in await lite.runtime.ledger.entries(stored.key_base) if e.name == "ping"]
    assert rows == [State.FAILED]
