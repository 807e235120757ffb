"""A run that is unwound while a call is in doubt: its service is asked; what stays in doubt becomes a dead letter."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from holdfast.authoring.tools import ToolContext, tool
from holdfast.contracts.failures import ToolFailed
from holdfast.contracts.profile import Effect, StepSpec
from holdfast.contracts.run import Phase, RunOutcome
from holdfast.recovery.dead_letters import DeadLetter, DeadLetters, LetterKind
from holdfast.reliability.ledger import State
from holdfast.testing.model import Message, call, say, sequence
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, cancelled, failure, until
from tests.fixtures.world import World, agent


async def letters(stage: Stage) -> list[DeadLetter]:
    return await DeadLetters(stage.runtime.db).find()


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


class TestSideBySide:
    """Two calls of one tool in one turn: of one nobody knows how it ended, and the other works."""

    @staticmethod
    def model(messages: list[Message]) -> Message:
        said = "\n".join(str(message.get("content")) for message in messages)
        asked = [made["function"]["name"] for message in messages for made in message.get("tool_calls") or ()]
        if not asked:
            return call(("mail", {"n": 1}), ("mail", {"n": 2}))
        if "send" not in asked:
            return call(("send", {}))
        return call(("mail", {"n": 3})) if "Call it again" in said and len(asked) == 3 else say("done")

    async def asked(self, stage: Stage, doubt_first: bool, critical: bool, both: bool = False) -> Any:
        """The run, when it waits for the approval of its message and has asked about the call in doubt."""
        last = asyncio.Event()

        @tool(effect=Effect.MANUAL, service="world", name="mail", timeout=PATIENCE_S)
        async def mail(ctx: ToolContext, n: int) -> str:
            """Mail."""
            if (n == 2) == doubt_first:
                await last.wait()
            if n == 1 or (both and n == 2):
                raise ConnectionResetError("in the middle")
            return f"mail {n} sent"

        steps = [StepSpec(name="notify", tools=["mail"], role="desk", critical=critical)]
        stage.model.script = self.model
        handle = await stage.start(agent(mail, World().tool("send", approval=True), steps=steps))
        async with asyncio.timeout(PATIENCE_S):
            while len(open_ := (await handle.describe()).raw_description.pending_activities) != 1 or (
                open_[0].activity_type.name != "tool"
            ):
                await asyncio.sleep(0.02)
        last.set()
        now = await until(handle, lambda s: any(a.subject == "send" for a in s.approvals))
        assert [(a.kind, a.role) for a in now.approvals if a.id == "o1"] == [("outcome", "desk")]
        await handle.signal("decide", {"approval_id": "a3", "verdict": "approve", "approver": "ada"})
        return handle

    @pytest.mark.parametrize("doubt_first", [True, False], ids=["doubt first", "doubt last"])
    async def test_the_end_of_an_optional_step_leaves_it_to_a_person(self, stage: Stage, doubt_first: bool) -> None:
        async with stage.worker():
            result = await (await self.asked(stage, doubt_first, critical=False)).result()
        key = f"{result.key_base}/1"
        assert (result.outcome, [(p.key, p.role) for p in result.pending]) == (RunOutcome.PARTIAL, [(key, "desk")])
        assert [(each.kind, each.key) for each in await letters(stage)] == [(LetterKind.CALL, key)]

    @pytest.mark.parametrize("doubt_first", [True, False], ids=["doubt first", "doubt last"])
    @pytest.mark.parametrize("verdict", ["happened", "did_not"])
    async def test_a_critical_step_waits_for_the_answer(self, lite: Stage, doubt_first: bool, verdict: str) -> None:
        async with lite.worker():
            handle = await self.asked(lite, doubt_first, critical=True)
            now = await until(
                handle, lambda s: s.phase is Phase.WAITING_HUMAN and "a3" not in {a.id for a in s.approvals}
            )
            assert [a.id for a in now.approvals] == ["o1"]
            await handle.signal("decide", {"approval_id": "o1", "verdict": verdict, "approver": "ada"})
            result = await handle.result()
        assert (result.outcome, result.pending, await letters(lite)) == (RunOutcome.COMPLETED, [], [])
        assert result.calls == (3 if verdict == "happened" else 4)

    async def test_when_both_are_in_doubt_each_has_its_answer(self, lite: Stage) -> None:
        async with lite.worker():
            handle = await self.asked(lite, doubt_first=True, critical=True, both=True)
            await handle.signal("decide", {"approval_id": "o1", "verdict": "happened", "approver": "ada"})
            now = await until(handle, lambda s: [a.id for a in s.approvals] == ["o2"])
            assert now.outcome is None
            await handle.signal("decide", {"approval_id": "o2", "verdict": "did_not", "approver": "ada"})
            result = await handle.result()
        assert (result.outcome, result.pending, result.calls) == (RunOutcome.COMPLETED, [], 4)


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
        await until(handle, lambda s: any("may still be processing" in note for note in s.notes))
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
