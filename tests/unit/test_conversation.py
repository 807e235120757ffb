"""What an answer stands for that the model did not get to the end of."""

from __future__ import annotations

from langchain_core.messages import AIMessage

from holdfast.reasoning.conversation import CUT, as_json, parse
from holdfast.testing.model import call, say
from tests.fixtures.world import World, agent

SPEC = agent(World().tool("book"))


def test_a_chat_models_message_tells_that_it_was_cut() -> None:
    whole = AIMessage("fine", response_metadata={"finish_reason": "stop"})
    half = AIMessage("fi", response_metadata={"finish_reason": "length"})
    assert CUT not in as_json(whole)
    assert as_json(half)[CUT]


def test_nothing_of_an_answer_that_was_cut_is_taken() -> None:
    assert parse(say("done"), SPEC)[0]
    for half in (say("do"), say(""), call(("book", {}), ("book", {}))):
        decision, told = parse({**half, CUT: True}, SPEC)
        assert decision is None
        assert len(told) == max(len(half.get("tool_calls", ())), 1), "every call has to be answered"
        assert all("cut at its limit" in each["content"] for each in told)
