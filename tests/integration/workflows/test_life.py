"""A run from start to end: how each outcome looks to Temporal, to the caller and in the store."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError

from activities import boundary
from holdfast.authoring import registry
from holdfast.authoring.agent import AgentSpec
from holdfast.authoring.services import BreakerRule
from holdfast.authoring.tools import ToolContext, tool
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ToolFailed, ToolRefused
from holdfast.contracts.profile import Effect, Profile, StepSpec
from holdfast.contracts.run import Phase, RunOutcome, RunResult, StepStatus
from holdfast.contracts.turn import OutcomeStatus
from holdfast.testing.model import Message, call, error, say, sequence, turn
from holdfast.testing.patience import PATIENCE_S
from holdfast.testing.stage import Stage, cancelled, failure, retried, status, until
from tests.fixtures.world import World, agent
from workflows.state import RunState, ToolEnd

uncached_too = pytest.mark.parametrize("options", [{}, {"max_cached_workflows": 0}], ids=["cached", "uncached"])


@tool(effect=Effect.READ, service="echo")
async def echo(ctx: ToolContext, text: str) -> str:
    """Echo."""
    return f"echo {text}"


def answers(messages: list[Message]) -> list[str]:
    """What the tools, and the platform in their place, have told the model."""
    return [m["content"] for m in messages if m["role"] == "tool"]


async def ended(handle: WorkflowHandle[Any, Any]) -> WorkflowExecutionStatus | None:
    return (await handle.describe()).status


@uncached_too
async def test_completes_with_its_result(stage: Stage, options: Json) -> None:
    spec = agent(echo)
    stage.model.script = sequence(call(("echo", {"text": "a"}), ("echo", {"text": "b"})), say("all done"))
    async with stage.worker(**options):
        handle = await stage.start(spec)
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert (result.summary, result.turns, result.calls) == ("all done", 2, 2)
    assert [s.status for s in result.steps] == [StepStatus.DONE]
    assert answers(stage.model.requests[-1][1]) == ["echo a", "echo b"]
    assert result.usage.calls == 2
    assert await stage.stored(handle) == result


async def test_independent_calls_of_one_decision_run_at_the_same_time(lite: Stage) -> None:
    meet = asyncio.Barrier(2)

    @tool(effect=Effect.READ, service="x", timeout=10)
    async def rendezvous(ctx: ToolContext) -> str:
        """Returns only when the other one has begun."""
        await meet.wait()
        return "met"

    spec = agent(rendezvous)
    lite.model.script = sequence(call(("rendezvous", {}), ("rendezvous", {})), say("ok"))
    async with lite.worker():
        result = await (await lite.start(spec)).result()
    assert (result.outcome, result.failures) == (RunOutcome.COMPLETED, 0)


async def test_an_optional_step_that_failed_for_good_is_left_pending_with_its_role(lite: Stage) -> None:
    world = World()
    spec = agent(
        world.tool("order", errors=[ToolFailed("out of stock")]),
        echo,
        steps=[
            StepSpec(name="pharmacy", tools=["order"], critical=False, role="pharmacist"),
            StepSpec(name="speak", tools=["echo"]),
        ],
    )
    lite.model.script = sequence(call(("order", {}), ("echo", {"text": "a"})), say("done but for the pharmacy"))
    async with lite.worker():
        handle = await lite.start(spec)
        result = await handle.result()
    assert result.outcome is RunOutcome.PARTIAL
    assert [(p.step, p.role, p.key) for p in result.pending] == [("pharmacy", "pharmacist", f"{result.key_base}/1")]
    assert "out of stock" in result.pending[0].what
    assert result.reason == "50 % complete, awaiting pharmacy (pharmacist)"
    assert await ended(handle) is WorkflowExecutionStatus.COMPLETED
    assert (await lite.stored(handle)).outcome is RunOutcome.PARTIAL


@pytest.mark.parametrize("critical", [True, False], ids=["critical", "optional"])
async def test_an_unknown_outcome_is_never_tried_again_and_goes_to_its_role(lite: Stage, critical: bool) -> None:
    """A critical step's end is waited for, for as long as it takes; an optional one is left pending."""
    world = World()
    never = asyncio.Event()
    send = world.tool("send", Effect.MANUAL, gate=never, timeout=0.2, undo=None)
    spec = agent(send, steps=[StepSpec(name="tell", tools=["send"], role="nurse", critical=critical)])
    lite.model.script = sequence(
        call(("send", {})), call(("send", {"n": 1})), say("could not be sure"), say("the nurse says that it was sent")
    )
    async with lite.worker():
        handle = await lite.start(spec)
        if critical:
            (asked,) = (await until(handle, lambda s: s.phase is Phase.WAITING_HUMAN)).approvals
            assert (asked.id, asked.kind, asked.role, asked.key[-2:]) == ("o1", "outcome", "nurse", "/1")
            assert "attempt 1, begun " in asked.evidence
            await handle.signal("decide", {"approval_id": "o1", "verdict": "happened", "approver": "n.smith"})
        result = await handle.result()
    assert world.log == ["begin send#1"]
    assert "#1 of send is unknown" in next(a for a in answers(lite.model.requests[2][1]) if "refused" in a)
    if critical:
        assert result.outcome is RunOutcome.COMPLETED
        assert result.steps[0].origin == "settled by n.smith"
        assert "n.smith settled call #1 of send: it happened." in lite.model.requests[-1][1][-1]["content"]
    else:
        assert result.outcome is RunOutcome.PARTIAL
        assert [(p.step, p.role, p.key) for p in result.pending] == [("tell", "nurse", f"{result.key_base}/1")]


async def test_what_a_person_says_did_not_happen_may_be_done_again(lite: Stage) -> None:
    world = World()
    never = asyncio.Event()
    send = world.tool("send", Effect.MANUAL, gate=never, timeout=0.2, undo=None)
    spec = agent(send, steps=[StepSpec(name="tell", tools=["send"])])
    lite.model.script = sequence(
        call(("send", {})), say("could not be sure"), call(("send", {})), say("sent, the second time")
    )
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: s.phase is Phase.WAITING_HUMAN)
        never.set()
        finding = {"approval_id": "o1", "verdict": "did_not", "approver": "n.smith", "comment": "nothing in the outbox"}
        await handle.signal("decide", finding)
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert world.log == ["begin send#1", "begin send#2", "done send#2"]
    (entry,) = [e for e in await lite.runtime.ledger.entries(result.key_base) if e.key.endswith("/1")]
    assert (entry.state, entry.settled and entry.settled.error) == (
        "FAILED",
        "n.smith says that it did not happen: nothing in the outbox",
    )


async def test_a_rejection_ends_the_run_rejected_and_undoes_what_was_done(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"), world.tool("send", approval=True))
    lite.model.script = sequence(call(("book", {})), call(("send", {})), say("rejected, so I stop"))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        decision = {"approval_id": "a2", "verdict": "reject", "approver": "dr.lee", "comment": "wrong dose"}
        await handle.signal("decide", decision)
        result = await handle.result()
    assert result.outcome is RunOutcome.REJECTED
    assert "wrong dose" in result.reason
    assert world.log == ["begin book#1", "done book#1", "undo book#1"]
    assert [(u.tool, u.status) for u in result.undone] == [("book", "undone")]
    assert await ended(handle) is WorkflowExecutionStatus.COMPLETED
    assert await lite.stored(handle) == result


async def test_the_reason_of_a_rejected_run_has_the_words_of_the_rejection_that_stands(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book", approval=True), world.tool("send", approval=True))
    lite.model.script = sequence(call(("book", {})), call(("send", {})), call(("send", {"n": 2})), say("rejected"))
    answers = {
        "a1": {"verdict": "approve", "comment": "fine with me"},
        "a2": {"verdict": "reject", "comment": "plainer words"},
        "a3": {"verdict": "reject", "comment": "wrong dose"},
    }
    async with lite.worker():
        handle = await lite.start(spec)
        for name, answer in answers.items():
            await until(handle, lambda s, it=name: [each.id for each in s.approvals] == [it])
            await handle.signal("decide", {"approval_id": name, "approver": "dr.lee", **answer})
        result = await handle.result()
    assert result.reason == "rejected by the human: send: wrong dose"


async def test_a_critical_step_that_is_gone_fails_the_run_and_unwinds_it(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"), world.tool("pay", errors=[ToolFailed("account closed")]))
    lite.model.script = sequence(call(("book", {})), call(("pay", {})))
    async with lite.worker():
        handle = await lite.start(spec)
        result = await failure(handle)
    assert result.outcome is RunOutcome.FAILED
    assert result.reason.startswith("critical step gone: pay")
    assert "account closed" in result.reason
    assert world.log[-1] == "undo book#1"
    assert await ended(handle) is WorkflowExecutionStatus.FAILED
    assert await lite.stored(handle) == result


async def test_turns_are_bounded(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"), max_turns=3)
    lite.model.script = lambda messages: call(("book", {"n": turn(messages)}))
    async with lite.worker():
        result = await failure(await lite.start(spec))
    assert result.reason.startswith("max turns: 3")
    assert len(lite.model.requests) == 3
    assert world.log[-3:] == ["undo book#3", "undo book#2", "undo book#1"]


async def test_a_loop_without_progress_ends_the_run(lite: Stage) -> None:
    spec = agent(echo)
    lite.model.script = lambda messages: call(("echo", {"text": "again"}))
    async with lite.worker():
        result = await failure(await lite.start(spec))
    assert result.reason.startswith("loop without progress")
    assert len(lite.model.requests) == 4


async def test_the_same_call_with_another_outcome_is_progress(lite: Stage) -> None:
    seen = 0

    @tool(effect=Effect.READ, service="x")
    async def poll(ctx: ToolContext) -> str:
        """Poll a job."""
        nonlocal seen
        seen += 1
        return f"{seen} of 6"

    spec = agent(poll)
    lite.model.script = lambda messages: say("ready") if turn(messages) == 7 else call(("poll", {}))
    async with lite.worker():
        result = await (await lite.start(spec)).result()
    assert result.outcome is RunOutcome.COMPLETED


async def test_finishing_without_a_critical_step_is_refused_and_the_model_told_which(lite: Stage) -> None:
    spec = agent(echo)
    lite.model.script = sequence(say("done!"), call(("echo", {"text": "a"})), say("now really"))
    async with lite.worker():
        handle = await lite.start(spec)
        result = await handle.result()
        notes = (await status(handle)).notes
    assert (result.outcome, result.summary) == (RunOutcome.COMPLETED, "now really")
    told = lite.model.requests[1][1][-1]
    assert (told["role"], "outcome yet: echo" in told["content"]) == ("user", True)
    assert "Finishing is refused" in notes[0]


async def test_finishing_refused_three_times_fails_the_run(lite: Stage) -> None:
    spec = agent(echo)
    lite.model.script = lambda messages: say("done, believe me")
    async with lite.worker():
        result = await failure(await lite.start(spec))
    assert result.reason == "critical step gone: echo: the model ended without calling `echo`; it never called a tool"
    assert len(lite.model.requests) == 3


async def test_what_the_model_left_undone_is_said_by_tool(lite: Stage) -> None:
    world = World()
    spec = agent(
        echo,
        world.tool("book", errors=[ToolRefused("no such room")]),
        world.tool("tell"),
        steps=[StepSpec(name="room", tools=["book", "tell"]), StepSpec(name="speak", tools=["echo"])],
    )
    lite.model.script = lambda m: call(("book", {}), ("echo", {"text": "a"})) if turn(m) == 1 else say("done")
    async with lite.worker():
        result = await failure(await lite.start(spec))
    words = "critical step gone: room: the model ended without calling `tell`; the last call of `book` was refused: "
    assert result.reason.startswith(words)
    assert "no such room" in result.reason


async def test_an_agent_without_steps_says_in_its_result_that_nothing_was_checked(lite: Stage) -> None:
    lite.model.script = lambda m: say("all is well")
    async with lite.worker():
        result = await (await lite.start(spec := agent(echo, steps=[]))).result()
    assert result.outcome is RunOutcome.COMPLETED
    note = f"The agent {spec.name} declares no steps, so its result was not checked. Tool calls made: 0"
    assert result.notes == [note]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({}, StepStatus.TODO),
        ({"book": OutcomeStatus.OK}, StepStatus.DONE),
        ({"book": OutcomeStatus.FAILED}, StepStatus.TODO),
        ({"book": OutcomeStatus.FAILED, "call": OutcomeStatus.OK}, StepStatus.DONE),
        ({"book": OutcomeStatus.FAILED, "call": OutcomeStatus.FAILED}, StepStatus.FAILED),
        ({"book": OutcomeStatus.OK, "call": OutcomeStatus.REJECTED}, StepStatus.REJECTED),
        ({"book": OutcomeStatus.OK, "call": OutcomeStatus.UNKNOWN}, StepStatus.PENDING),
    ],
)
def test_one_of_the_tools_of_a_step_fulfils_it_where_the_step_says_so(
    ends: dict[str, OutcomeStatus], expected: StepStatus
) -> None:
    step = StepSpec(name="visit", tools=["book", "call"], one_of=True)
    state = RunState(key_base="w/1", started=datetime.now(UTC), profile=Profile(agent="a", steps=[step]))
    state.ends = {tool: ToolEnd(status=status, seq=n) for n, (tool, status) in enumerate(ends.items(), 1)}
    assert [each.status for each in state.steps()] == [expected]


async def test_an_optional_step_that_was_never_tried_is_pending(lite: Stage) -> None:
    spec = agent(echo, steps=[StepSpec(name="speak", tools=["echo"], critical=False, role="nurse")])
    lite.model.script = lambda messages: say("skipped it")
    async with lite.worker():
        result = await (await lite.start(spec)).result()
    assert (result.outcome, result.pending[0].step, result.pending[0].role) == (RunOutcome.PARTIAL, "speak", "nurse")


# ------------------------------------------------------------ the model's mistakes


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (call(("shout", {"text": "a"})), "there is no tool named 'shout'; the tools are: echo"),
        (call(("echo", {"txt": "a"})), "text: Field required"),
        (call(("echo", '{"text": ')), "not valid JSON"),
        (call(("echo", '{"text": "half \\ud83d"}')), "not valid JSON"),
        (call(("echo", "[" * 5000)), "not valid JSON"),
        (call(("echo", "[1]")), "do not fit its schema"),
        (say("   "), "Your answer was empty"),
    ],
    ids=["unknown tool", "bad arguments", "invalid JSON", "half a character", "too deep", "not an object", "empty"],
)
async def test_a_malformed_answer_goes_back_with_the_error_in_the_same_turn(
    lite: Stage, bad: Message, told: str
) -> None:
    spec = agent(echo)
    lite.model.script = sequence(bad, call(("echo", {"text": "a"})), say("ok"))
    async with lite.worker():
        result = await (await lite.start(spec)).result()
    assert (result.outcome, result.turns, result.calls, result.usage.calls) == (RunOutcome.COMPLETED, 2, 1, 3)
    assert told in lite.model.requests[1][1][-1]["content"]


async def test_halves_of_characters_from_a_model_or_a_tool_stop_no_run(lite: Stage) -> None:
    """JSON can spell them (`\\ud83d` without its other half); UTF-8, and so history, cannot hold them."""

    @tool(effect=Effect.IDEMPOTENT, service="x")
    async def feel(ctx: ToolContext, fails: bool = False) -> str:
        """Feel."""
        if fails:
            raise ToolFailed("not \ud83d")
        return "a smile \ud83d"

    lite.model.script = sequence(call(("feel", {}), ("feel", {"fails": True})), say("ended \ud83d\ude00 \ud83d"))
    async with lite.worker():
        result = await (await lite.start(agent(feel, steps=[]))).result()
    assert (result.outcome, result.summary) == (RunOutcome.COMPLETED, "ended 😀 \ufffd")
    assert [each.rpartition(" ")[2] for each in answers(lite.model.requests[1][1])] == ["\ufffd", "\ufffd"]


async def test_one_bad_call_of_an_answer_holds_all_of_them_back(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"))
    lite.model.script = sequence(call(("book", {}), ("nope", {})), call(("book", {})), say("ok"))
    async with lite.worker():
        await (await lite.start(spec)).result()
    assert world.log == ["begin book#1", "done book#1"]
    assert len(answers(lite.model.requests[1][1])) == 2, "every call of the answer is answered"


async def test_output_that_stays_malformed_fails_the_run_after_two_re_asks(lite: Stage) -> None:
    spec = agent(echo)
    lite.model.script = lambda messages: call(("shout", {}))
    async with lite.worker():
        result = await failure(await lite.start(spec))
    assert len(lite.model.requests) == 3
    assert "invalid 3 times" in result.reason
    assert "no tool named 'shout'" in result.reason


async def test_a_refused_call_goes_back_to_the_model_and_is_no_end_of_its_step(lite: Stage) -> None:
    world = World()

    @tool(effect=Effect.IDEMPOTENT, service="x")
    async def order(ctx: ToolContext, n: int) -> str:
        """Order."""
        if n > 3:
            raise_refused(f"at most 3, not {n}")
        world.log.append(f"ordered {n}")
        return "ordered"

    spec = agent(order)
    lite.model.script = sequence(call(("order", {"n": 9})), call(("order", {"n": 2})), say("ok"))
    async with lite.worker():
        result = await (await lite.start(spec)).result()
    assert (result.outcome, world.log) == (RunOutcome.COMPLETED, ["ordered 2"])
    assert "at most 3, not 9" in answers(lite.model.requests[1][1])[0]


def raise_refused(text: str) -> None:
    from holdfast.contracts.failures import ToolRefused

    raise ToolRefused(text)


# ------------------------------------------------------------ the model is gone


@uncached_too
async def test_a_model_that_takes_no_key_parks_the_run_which_goes_on_when_it_is_mended(
    lite: Stage, options: Json
) -> None:
    world = World()
    spec = agent(world.tool("book"))
    answering = sequence(call(("book", {})), say("done"))
    broken = True
    lite.model.script = lambda m: error(401) if broken and turn(m) == 2 else answering(m)
    async with lite.worker(**options):
        handle = await lite.start(spec)
        parked = await until(handle, lambda s: s.phase is Phase.PARKED)
        assert any("the model is unavailable" in note for note in parked.notes)
        broken = False
        result = await handle.result()
    assert (result.outcome, result.turns) == (RunOutcome.COMPLETED, 2)
    assert world.log == ["begin book#1", "done book#1"], "nothing undone, nothing repeated"


async def test_a_model_that_is_down_for_long_parks_the_run_and_nothing_is_undone(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"))
    answering = sequence(call(("book", {})), say("done"))
    up = asyncio.Event()

    def script(messages: list[Message]) -> Any:
        return error(503) if turn(messages) == 2 and not up.is_set() else answering(messages)

    lite.model.script = script
    (model,) = lite.runtime.models
    model.service = replace(model.service, breaker=BreakerRule(probe_after_s=6))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda now: any("model fake-1" in note for note in now.notes))
        up.set()
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
    assert world.log == ["begin book#1", "done book#1"]


async def test_a_request_that_the_model_refuses_fails_the_run(lite: Stage) -> None:
    spec = agent(echo)
    lite.model.script = lambda messages: error(400, "bad_thing")
    async with lite.worker():
        handle = await lite.start(spec)
        result = await failure(handle)
    assert "the model refuses" in result.reason
    assert len(lite.model.requests) == 1
    assert await lite.stored(handle) == result


# ------------------------------------------------------------ deadline


async def test_a_run_that_outlives_its_deadline_fails_and_unwinds(lite: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"), deadline=timedelta(seconds=3))
    lite.model.script = lambda m: error(401) if turn(m) == 2 else call(("book", {}))  # parks
    async with lite.worker():
        handle = await lite.start(spec)
        result = await failure(handle)
    assert result.reason.startswith("deadline")
    assert world.log == ["begin book#1", "done book#1", "undo book#1"]
    assert await lite.stored(handle) == result


async def test_a_bug_in_the_first_turn_fails_the_run_at_the_end_of_a_day(
    skipping: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried again every hour here; at half a minute, as it is, the test would wait for 2,900 attempts."""
    monkeypatch.setattr("activities.boundary.backoff", lambda *_: 3600.0)

    def broken(messages: list[Message]) -> str:
        raise LookupError("no such ward")

    spec = agent(echo, prompt=broken)
    async with skipping.worker():
        handle = await skipping.start(spec)
        result = await failure(handle)
    assert result.reason.startswith("turn 1: LookupError: no such ward")
    ended = await handle.describe()
    assert ended.close_time is not None
    assert timedelta(hours=22) < ended.close_time - ended.start_time < timedelta(hours=25)


async def test_waits_do_not_prolong_the_deadline_of_a_call(lite: Stage) -> None:
    """Each wait ends an activity; the next one gets what is left."""

    @tool(effect=Effect.READ, service="x", deferrable=False, deadline=3)
    async def summary(ctx: ToolContext) -> str:
        """Waits for a model that takes no key."""
        return (await ctx.ask_model("sum", [{"role": "user", "content": "sum"}])).text

    lite.model.script = lambda m: (
        error(401) if m[-1]["content"] == "sum" else sequence(call(("summary", {})), say("x"))(m)
    )
    async with lite.worker():
        handle = await lite.start(agent(summary, steps=[]))
        assert (await handle.result()).outcome is RunOutcome.COMPLETED
        tried = [
            (event.event_time.ToDatetime(), event.activity_task_scheduled_event_attributes)
            async for event in handle.fetch_history_events()
            if event.activity_task_scheduled_event_attributes.activity_type.name == "tool"
        ]
    latest = [at + each.schedule_to_close_timeout.ToTimedelta() for at, each in tried]
    assert len(tried) > 3
    # A second at least: an attempt has to have time to say what is known.
    assert max(latest) <= tried[0][0] + timedelta(seconds=3 + 1.2)


# ------------------------------------------------------------ started by hand


async def by_hand(stage: Stage, value: Any) -> WorkflowHandle[Any, RunResult]:
    """As `temporal workflow start --type AgentWorkflow --input …` does it."""
    return await stage.client.start_workflow(
        "AgentWorkflow",
        value,
        id=f"hand-{id(value)}-{stage.queue}",
        task_queue=stage.queue,
        result_type=RunResult,
    )


async def test_started_by_plain_json(lite: Stage) -> None:
    spec = agent(echo)
    lite.model.script = sequence(call(("echo", {"text": "a"})), say("ok"))
    async with lite.worker():
        handle = await by_hand(lite, {"agent": spec.name, "input": {"what": "y"}})
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert '"y"' in lite.model.requests[0][1][1]["content"]


async def test_an_unknown_agent_fails_the_run_and_names_those_there_are(
    lite: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary, "KNOWN_EVERY_S", 0.01)
    spec = agent(echo)
    async with lite.worker():
        handle = await by_hand(lite, {"agent": "nobody"})
        result = await failure(handle)
    assert "no agent named 'nobody'" in result.reason
    assert spec.name in result.reason
    assert await lite.stored(handle) == result


async def test_a_run_that_begins_before_a_worker_knows_its_agent_waits_for_one_that_does(lite: Stage) -> None:
    spec = agent(echo)
    lite.model.script = sequence(call(("echo", {"text": "a"})), say("ok"))
    registry._added.pop(spec.name)  # pyright: ignore[reportPrivateUsage]
    async with lite.worker():
        handle = await by_hand(lite, {"agent": spec.name, "input": {"what": "y"}})
        await retried(handle)
        registry.add(spec)
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED


async def test_an_input_that_does_not_fit_the_agent_fails_the_run_and_says_why(lite: Stage) -> None:
    class Strict(BaseModel):
        patient_id: str

    spec = agent(echo, input=Strict)
    async with lite.worker():
        handle = await by_hand(lite, {"agent": spec.name, "input": {"patient": 7}})
        result = await failure(handle)
    assert "patient_id: Field required" in result.reason
    assert lite.model.requests == []


@pytest.mark.parametrize("value", [{"input": {}}, {"agent": 7}, "discharge"], ids=str)
async def test_a_start_without_sense_ends_at_once_and_says_what_is_expected(lite: Stage, value: Any) -> None:
    async with lite.worker():
        handle = await by_hand(lite, value)
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(WorkflowFailureError) as caught:
                await handle.result()
    cause = caught.value.cause
    assert isinstance(cause, ApplicationError)
    assert cause.type == "invalid_input"
    assert 'an object like {"agent"' in cause.message


async def test_a_cancelled_run_has_its_result_in_the_store(stage: Stage) -> None:
    world = World()
    spec = agent(world.tool("book"), world.tool("send", approval=True))
    stage.model.script = sequence(call(("book", {})), call(("send", {})))
    async with stage.worker():
        handle = await stage.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        await handle.cancel()
        await cancelled(handle)
    result = await stage.stored(handle)
    assert result.outcome is RunOutcome.CANCELLED
    assert [(u.tool, u.status) for u in result.undone] == [("book", "undone")]


async def test_a_tool_that_is_newer_than_the_run_is_refused(lite: Stage) -> None:
    """A deploy in the middle of a run offers the model a tool whose rules the run does not know."""
    world = World()
    spec = agent(world.tool("book"), world.tool("send", approval=True))
    newer = AgentSpec(
        name=spec.name,
        description="test",
        instructions="test",
        input=spec.input,
        steps=spec.steps,
        tools=(*spec.tools, world.tool("audit")),
    )
    lite.model.script = sequence(call(("book", {}), ("send", {})), call(("audit", {})), say("done"))
    async with lite.worker():
        handle = await lite.start(spec)
        await until(handle, lambda s: bool(s.approvals))
        registry.add(newer)
        await handle.signal("decide", {"approval_id": "a2", "verdict": "approve", "approver": "dr.lee"})
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert "later version of the agent" in lite.model.requests[-1][1][-1]["content"]
    assert "done audit#3" not in world.log
