"""The gate decides from the state alone: every answer that it has, and which effects answer which call."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from holdfast.contracts.people import ApprovalDecision, DecidedApproval, Verdict
from holdfast.contracts.profile import Effect, Profile, ToolPolicy
from holdfast.contracts.run import Standing
from holdfast.contracts.tool_call import Outcome
from holdfast.contracts.turn import OutcomeStatus, ToolCall
from workflows import questions
from workflows.gate import Answered, Ask, Decision, Deny, Proceed, Wait, judge
from workflows.state import CallState, Deferred, RunState, ToolEnd

NOW = datetime(2026, 11, 26, tzinfo=UTC)
TOOLS = {
    "book": ToolPolicy(effect=Effect.IDEMPOTENT),
    "send": ToolPolicy(effect=Effect.MANUAL, approval=True),
    "look": ToolPolicy(effect=Effect.READ),
}


def state(*tools: str) -> RunState:
    calls = [CallState(call=ToolCall(tool=tool), seq=n) for n, tool in enumerate(tools, 1)]
    return RunState(key_base="run/1", started=NOW, turn=1, calls=calls, profile=Profile(agent="a", tools=TOOLS))


def decided(run: RunState, n: int, verdict: Verdict, **more: str) -> None:
    asked = questions.may_run(run, run.calls[n - 1], NOW)
    decision = ApprovalDecision(approval_id=asked.id, verdict=verdict, approver="dr.lee", **more)
    run.approvals.decided[asked.id] = DecidedApproval(approval=asked, decision=decision, decided_at=NOW)


def gate(run: RunState, n: int = 1, *standing: Standing) -> Decision:
    before = run.model_copy(deep=True)
    answer = judge(run, list(standing), run.calls[n - 1], NOW)
    assert run == before, "the gate changes nothing"
    return answer


def test_a_call_without_a_rule_against_it_proceeds() -> None:
    assert gate(state("book")) == Proceed()


def test_a_call_that_needs_approval_is_asked_about_until_a_person_has_decided() -> None:
    run = state("send")
    assert isinstance(gate(run), Ask)
    decided(run, 1, Verdict.APPROVE)
    assert gate(run) == Proceed()


def test_a_rejected_call_is_denied_with_the_reason() -> None:
    run = state("send")
    decided(run, 1, Verdict.REJECT, comment="not today")
    answer = gate(run)
    assert isinstance(answer, Deny)
    assert (answer.outcome.status, "not today" in answer.outcome.content) == (OutcomeStatus.REJECTED, True)


def test_an_edit_counts_when_the_tool_has_accepted_it() -> None:
    run = state("send")
    decided(run, 1, Verdict.EDIT)
    assert isinstance(gate(run), Ask)
    run.calls[0].edited_by = "dr.lee"
    assert gate(run) == Proceed()


def test_nothing_is_decided_before_the_run_has_looked_back() -> None:
    run = state("book")
    run.look_back_due = True
    assert gate(run) == Wait()


def test_a_call_that_was_decided_on_what_no_longer_stands_is_denied() -> None:
    run = state("book")
    run.void_turn = 1
    assert isinstance(gate(run), Deny)
    run.calls[0].acting = True
    assert gate(run) == Proceed()


@pytest.mark.parametrize("tool", ["book", "look"])
def test_an_unknown_outcome_stops_further_calls_with_an_effect(tool: str) -> None:
    run = state(tool)
    run.ends[tool] = ToolEnd(status=OutcomeStatus.UNKNOWN, seq=9)
    assert isinstance(gate(run), Proceed if tool == "look" else Deny)


def test_a_deferred_call_stops_further_calls_of_its_tool() -> None:
    run = state("look")
    run.deferred.append(Deferred(call=ToolCall(tool="look"), seq=9, until=NOW, since=NOW, why="down"))
    assert isinstance(gate(run), Deny)


def test_a_tool_that_is_newer_than_the_run_is_denied() -> None:
    assert isinstance(gate(state("fax")), Deny)


def test_an_effect_of_an_earlier_run_answers_one_call() -> None:
    run, before = state("book", "book"), Standing(tool="book", key="old/1", content="booked")
    answer = gate(run, 1, before)
    assert answer == Answered(Outcome(content="booked", origin="done before, under key old/1"), "old/1")
    run.stood.append("old/1")
    assert gate(run, 2, before) == Proceed()


def test_after_a_reset_each_call_of_the_turn_is_answered_by_its_own_effect() -> None:
    run = state("book", "book", "book")
    run.standing = [Standing(tool="book", key=f"run/1/{n}", content=f"room {n}") for n in (1, 2)]
    answers = [gate(run, n) for n in (3, 2, 1)]
    assert answers[0] == Proceed(), "what belongs to another call of the turn answers no third one"
    assert [each.outcome.content for each in answers[1:] if isinstance(each, Answered)] == ["room 2", "room 1"]


def test_an_effect_that_answered_its_own_call_answers_no_later_one() -> None:
    run = state("book")
    run.standing = [Standing(tool="book", key="run/1/1", content="room 1")]
    run.calls[0].outcome = Outcome(content="room 1")
    run.account(run.calls[0])
    run.calls = [CallState(call=ToolCall(tool="book"), seq=2)]
    assert gate(run) == Proceed()


@pytest.mark.parametrize("verdict", [Verdict.APPROVE, Verdict.REJECT])
def test_after_a_reset_a_call_that_a_person_was_asked_about_goes_by_the_answer(verdict: Verdict) -> None:
    """It goes out under its own key, where the ledger has its result."""
    run = state("send", "send")
    run.standing = [Standing(tool="send", key=f"run/1/{n}", content=f"letter {n}") for n in (1, 2)]
    for n in (1, 2):
        asked = questions.may_run(run, run.calls[n - 1], NOW)
        run.approvals.open[asked.id] = asked
    decided(run, 2, verdict, comment="not today")
    assert isinstance(gate(run, 2), Proceed if verdict is Verdict.APPROVE else Deny)
    assert isinstance(gate(run, 1), Ask)
