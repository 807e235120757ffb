"""What stands in for a tool: another one, the last good result, a template; and never for what may have happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from temporalio.exceptions import ApplicationError

from activities.tools import Tools
from holdfast.authoring.tools import LastGood, Tool, ToolContext, Undo, tool
from holdfast.contracts.failures import ToolRefused
from holdfast.contracts.profile import Effect
from holdfast.contracts.tool_call import GiveUp, Outcome, ToolRequest, UndoStatus
from holdfast.contracts.turn import OutcomeStatus
from holdfast.reliability.crash_points import Point
from holdfast.reliability.ledger import State
from tests.fixtures.clock import Ahead
from tests.fixtures.world import agent
from tests.integration.activities.conftest import Process

GONE = ConnectionRefusedError("nobody there")
WHY = "ConnectionRefusedError: nobody there"
LOST = ConnectionResetError("the answer was lost")
OK, FAILED, UNKNOWN = OutcomeStatus.OK, OutcomeStatus.FAILED, OutcomeStatus.UNKNOWN
EFFECTS = [effect for effect in Effect if effect is not Effect.READ]


@dataclass
class Outside:
    """What was done outside, in order: 'online 1', 'undo phone 1', …"""

    log: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def tool(
        self, name: str, effect: Effect = Effect.IDEMPOTENT, errors: Sequence[Exception] = (), **declared: Any
    ) -> Tool:
        """A tool of a service of its own name. errors: raised by the first calls, before they act."""
        left = list(errors)

        async def act(ctx: ToolContext, n: int) -> str:
            """Book."""
            self.keys.append(ctx.key)
            if left:
                raise left.pop(0)
            self.log.append(f"{name} {n}")
            return f"booked {n} by {name}"

        bound = {} if effect is Effect.READ else {"settles_within": 0}
        made = tool(effect=effect, service=name, name=name, **{"retries": 0, **bound, **declared})(act)

        async def found(ctx: ToolContext, n: int) -> None:
            return None

        async def revert(ctx: ToolContext, what: Undo) -> str:
            self.log.append(f"undo {name} {what.arguments['n']}")
            return f"cancelled by {name}"

        if effect is Effect.PROBE:
            made.probe(found)
        if effect is not Effect.READ:
            made.undo(revert)
        return made


@dataclass
class Desk:
    """One tool with its fallbacks, and the platform around it."""

    process: Process
    request: ToolRequest
    clock: Ahead

    async def run(self, **change: Any) -> Outcome:
        activities = Tools(self.process.runtime)
        return await self.process.run(activities.tool, self.request.model_copy(update=change))

    async def undo(self) -> Any:
        return await self.process.run(Tools(self.process.runtime).undo, self.request)

    async def trip(self, *services: str) -> None:
        guards = self.process.runtime.guards
        for each in services:
            await guards.breaker.trip(each, "for the test", "ada")
        guards._shut_at = float("-inf")  # what it knows of breakers may be a second old

    async def reset(self, service: str) -> None:
        await self.process.runtime.guards.breaker.reset(service, "ada")
        await self.trip()

    async def states(self) -> dict[str, State]:
        return {e.key: e.state for e in await self.process.runtime.ledger.entries("wf/run")}


@pytest.fixture
def outside() -> Outside:
    return Outside()


def desk(process: Process, made: Tool) -> Desk:
    clock = Ahead(process.runtime.db, process.runtime.guards)
    spec = agent(made)
    request = ToolRequest(agent=spec.name, key_base="wf/run", seq=1, tool=made.name, arguments={"n": 7})
    return Desk(process, request, clock)


# ------------------------------------------------------------ another tool


@pytest.mark.parametrize("effect", Effect)
async def test_when_a_tool_certainly_failed_the_other_does_it_and_the_outcome_says_so(
    process: Process, outside: Outside, effect: Effect
) -> None:
    phone = outside.tool("phone", effect)
    at = desk(process, outside.tool("online", effect, [GONE], fallback=(phone,)))
    outcome = await at.run()
    assert (outcome.status, outcome.origin) == (OK, "phone")
    assert outcome.content == f"[phone, in place of online: {WHY}]\nbooked 7 by phone"
    assert outcome.notes == [f"online: phone ({WHY})"]
    assert (outside.log, outside.keys) == (["phone 7"], ["wf/run/1", "wf/run/1/fb-1"])


async def test_it_is_stood_in_for_only_when_its_own_retries_are_used_up(process: Process, outside: Outside) -> None:
    phone = outside.tool("phone")
    at = desk(process, outside.tool("online", errors=[GONE, GONE], retries=1, fallback=(phone,)))
    with pytest.raises(ApplicationError):
        await at.run()
    assert outside.log == []
    assert (await at.run()).origin == "phone"


async def test_of_several_the_first_that_can_does_it(process: Process, outside: Outside) -> None:
    phone, fax = outside.tool("phone", errors=[GONE]), outside.tool("fax")
    at = desk(process, outside.tool("online", errors=[GONE], fallback=(phone, fax)))
    assert (await at.run()).origin == "fax"
    assert outside.keys == ["wf/run/1", "wf/run/1/fb-1", "wf/run/1/fb-2"]


@pytest.mark.parametrize("effect", EFFECTS)
async def test_nothing_stands_in_for_a_call_that_may_have_happened(
    process: Process, outside: Outside, effect: Effect
) -> None:
    at = desk(process, outside.tool("online", effect, [LOST], fallback=(outside.tool("phone", effect),)))
    assert (await at.run()).status is UNKNOWN
    assert outside.keys == ["wf/run/1"]


async def test_the_models_own_mistake_is_told_and_not_stood_in_for(process: Process, outside: Outside) -> None:
    at = desk(process, outside.tool("online", errors=[ToolRefused("no such day")], fallback=(outside.tool("phone"),)))
    outcome = await at.run()
    assert (outcome.status, outcome.origin, outside.log) == (OutcomeStatus.ERROR, "", [])


async def test_one_that_stood_in_and_may_have_acted_is_named_to_the_person_who_settles_it(
    process: Process, outside: Outside
) -> None:
    phone = outside.tool("phone", errors=[LOST])
    at = desk(process, outside.tool("online", errors=[GONE], fallback=(phone, outside.tool("fax"))))
    outcome = await at.run()
    assert outcome.status is UNKNOWN
    assert outcome.known.startswith("key wf/run/1/fb-1, attempt 1")
    assert outside.log == [], "the third must not do it a second time"


# ------------------------------------------------------------ while its breaker is open


@pytest.mark.parametrize("effect", Effect)
async def test_while_its_service_is_down_the_other_does_it_and_it_is_never_done_twice(
    process: Process, outside: Outside, effect: Effect
) -> None:
    at = desk(process, outside.tool("online", effect, fallback=(outside.tool("phone", effect),)))
    await at.trip("online")
    outcome = await at.run()
    assert (outcome.status, outcome.origin, outside.log) == (OK, "phone", ["phone 7"])
    if effect is Effect.READ:
        return
    await at.reset("online")
    assert (await at.run()).content.splitlines()[1] == "booked 7 by phone"
    assert outside.log == ["phone 7"], "a retry that finds its service well again does not act"
    assert await at.states() == {"wf/run/1": State.FAILED, "wf/run/1/fb-1": State.DONE}


@pytest.mark.parametrize("effect", [Effect.IDEMPOTENT, Effect.PROBE])
async def test_while_its_service_is_down_a_call_that_may_have_happened_waits_for_it(
    process: Process, outside: Outside, effect: Effect
) -> None:
    at = desk(process, outside.tool("online", effect, [LOST], retries=3, fallback=(outside.tool("phone", effect),)))
    with pytest.raises(ApplicationError):
        await at.run()
    await at.trip("online")
    outcome = await at.run()
    assert outcome.wait is not None
    assert (outcome.wait.service, outside.log) == ("online", [])
    await at.reset("online")
    assert (await at.run()).origin == ""
    assert outside.log == ["online 7"]


@pytest.mark.parametrize("effect", Effect)
async def test_while_all_are_down_it_waits_and_its_own_service_does_it_when_first_back(
    process: Process, outside: Outside, effect: Effect
) -> None:
    at = desk(process, outside.tool("online", effect, fallback=(outside.tool("phone", effect),)))
    await at.trip("online", "phone")
    assert (await at.run()).wait is not None
    await at.reset("online")
    outcome = await at.run()
    assert (outcome.status, outcome.origin, outside.log) == (OK, "", ["online 7"])


@pytest.mark.parametrize("effect", Effect)
async def test_a_call_that_failed_waits_for_the_one_that_may_stand_in_later(
    process: Process, outside: Outside, effect: Effect
) -> None:
    at = desk(process, outside.tool("online", effect, [GONE, GONE], fallback=(outside.tool("phone", effect),)))
    await at.trip("phone")
    outcome = await at.run()
    assert outcome.wait is not None
    assert outcome.wait.service == "phone"
    await at.reset("phone")
    assert (await at.run()).origin == "phone"
    assert outside.log == ["phone 7"]


@pytest.mark.parametrize("point", [Point.RESERVED, Point.EFFECT_DONE, Point.RECORDED])
async def test_a_crash_while_another_stands_in_makes_no_second_effect(
    process: Process, outside: Outside, point: Point
) -> None:
    at = desk(process, outside.tool("online", fallback=(outside.tool("phone"),)))
    await at.trip("online")
    await process.dies(point, Tools(process.runtime).tool, at.request)
    await at.reset("online")
    assert (await at.run()).origin == "phone"
    assert set(outside.keys) == {"wf/run/1/fb-1"}, "the same key, which its service honours"


# ------------------------------------------------------------ the last good result, a template


async def test_the_last_good_result_of_a_read_tells_its_age(process: Process, outside: Outside) -> None:
    prices = outside.tool("prices", Effect.READ, fallback=(LastGood(timedelta(hours=6)),))
    at = desk(process, prices)
    assert (await at.run()).origin == ""
    at.clock.seconds += 3 * 3600
    await at.trip("prices")
    outcome = await at.run()
    assert (outcome.status, outcome.origin) == (OK, "last good result, 3 h old")
    assert outcome.content.splitlines()[1] == "booked 7 by prices"


@pytest.mark.parametrize(
    ("change", "hours"),
    [({"arguments": {"n": 8}}, 1), ({"tenant": "another"}, 1), ({}, 7)],
    ids=["arguments", "tenant", "too old"],
)
async def test_it_answers_the_same_question_of_the_same_tenant_only_and_not_for_ever(
    process: Process, outside: Outside, change: dict[str, Any], hours: int
) -> None:
    at = desk(process, outside.tool("prices", Effect.READ, fallback=(LastGood(timedelta(hours=6)),)))
    await at.run()
    at.clock.seconds += 3600 * hours
    await at.trip("prices", "prices@another")
    outcome = await at.run(**change)
    assert outcome.wait is not None
    assert outcome.content == ""


async def test_a_template_is_the_last_resort_and_made_of_the_arguments(process: Process, outside: Outside) -> None:
    summary = outside.tool("summary", Effect.READ, [GONE], fallback=(LastGood(timedelta(hours=6)),))

    @summary.template
    async def plain(ctx: ToolContext, n: int) -> str:
        return f"summary of {n}, to be written by hand"

    at = desk(process, summary)
    outcome = await at.run()
    assert (outcome.status, outcome.origin) == (OK, "template")
    assert outcome.content.splitlines()[1] == "summary of 7, to be written by hand"
    assert (await at.run()).origin == "", "well again, it answers itself"


# ------------------------------------------------------------ undo


@pytest.mark.parametrize("effect", EFFECTS)
async def test_the_one_that_stood_in_is_the_one_that_is_undone(
    process: Process, outside: Outside, effect: Effect
) -> None:
    at = desk(process, outside.tool("online", effect, [GONE], fallback=(outside.tool("phone", effect),)))
    await at.run()
    for _ in range(2):
        ended = await at.undo()
        assert (ended.status, ended.note) == (UndoStatus.UNDONE, "cancelled by phone")
    assert outside.log == ["phone 7", "undo phone 7"]
    assert await at.states() == {
        "wf/run/1": State.FAILED,
        "wf/run/1/fb-1": State.COMPENSATED,
        "wf/run/1/fb-1/undo": State.DONE,
    }


async def test_a_call_that_did_it_itself_is_undone_itself_and_nobody_stands_in_afterwards(
    process: Process, outside: Outside
) -> None:
    at = desk(process, outside.tool("online", fallback=(outside.tool("phone"),)))
    await at.run()
    assert (await at.undo()).note == "cancelled by online"
    assert outside.log == ["online 7", "undo online 7"]
    late = await at.run()
    assert late.status is OutcomeStatus.ERROR
    assert outside.log == ["online 7", "undo online 7"]


async def test_after_the_undo_of_a_call_that_never_was_nobody_stands_in_for_it(
    process: Process, outside: Outside
) -> None:
    at = desk(process, outside.tool("online", fallback=(outside.tool("phone"),)))
    assert (await at.undo()).status is UndoStatus.NOTHING
    assert (await at.run()).status is OutcomeStatus.ERROR
    assert outside.log == []


# ------------------------------------------------------------ giving up


async def test_a_call_that_was_given_up_never_acts_again_nor_does_its_fallback(
    process: Process, outside: Outside
) -> None:
    phone = outside.tool("phone")
    at = desk(process, outside.tool("online", errors=[GONE], fallback=(phone,)))
    activities = Tools(process.runtime)
    outcome = await process.run(activities.give_up, GiveUp(request=at.request, why="waited too long"))
    assert (outcome.status, outcome.reason) == (FAILED, "waited too long")
    late = await at.run()
    assert (late.status, outside.log, outside.keys) == (FAILED, [], [])


async def test_a_call_given_up_in_doubt_is_unknown(process: Process, outside: Outside) -> None:
    at = desk(process, outside.tool("online", Effect.IDEMPOTENT))
    activities = Tools(process.runtime)
    await process.dies(Point.EFFECT_DONE, activities.tool, at.request)
    outcome = await process.run(activities.give_up, GiveUp(request=at.request, why="waited too long"))
    assert outcome.status is UNKNOWN
    assert "attempt 2" in outcome.known
