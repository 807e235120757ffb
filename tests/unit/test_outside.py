"""What is taken of JSON from outside, and what becomes of the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.types import Interrupt
from pydantic_core import from_json, to_json
from temporalio.exceptions import ApplicationError

from activities.batches import page
from activities.plan import _question  # pyright: ignore[reportPrivateUsage]
from holdfast.authoring.batch import BatchSpec
from holdfast.contracts import door, outside
from holdfast.contracts.batch import Item
from holdfast.contracts.people import ApprovalDecision
from holdfast.contracts.turn import Reply
from holdfast.engine.client import DATA_CONVERTER
from holdfast.engine.starting import BadRequest, start_run
from holdfast.reasoning.graph import BadGraph
from holdfast.reasoning.turns import decision_of
from tests.fixtures.world import Anything, World, agent


def nested(depth: int) -> Any:
    value: Any = "x"
    for n in range(depth):
        value = [value] if n % 2 else {"a": value}
    return value


HOSTILE = {
    "deep": nested(65),
    "too deep to be read": nested(198),
    "too deep to be written": nested(5_000),
    "large": "x" * 2_000_001,
    "many": [0] * 100_001,
    "a large number": {"n": 2**64},
    "not a number": [float("nan")],
    "infinite": [float("-inf")],
    "half a character": {"text": "\ud83d"},
    "half a character in a name": {"\ud83d": 1},
}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None))
anything = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec=None)), inner), max_leaves=30
)


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_what_is_hostile_is_refused_in_words(value: Any) -> None:
    assert outside.problem(value).startswith(("is ", "has "))


@pytest.mark.parametrize("value", [None, "", 0, {}, [], nested(64), "日本", "\0", -(2**63), 1.5, [[]] * 1000], ids=str)
def test_what_is_usual_is_taken(value: Any) -> None:
    assert outside.problem(value) == ""
    assert outside.fitting(value) == value


@given(anything)
def test_what_is_taken_comes_back_the_same_from_all_that_writes_and_reads(value: Any) -> None:
    if not outside.problem(value):
        assert from_json(to_json(value)) == value
        assert json.loads(json.dumps(value, ensure_ascii=False).encode()) == value
        assert outside.fitting(value) == value


@given(anything)
def test_what_is_made_fitting_is_taken(value: Any) -> None:
    assert outside.problem(outside.fitting(value)) == ""


@pytest.mark.parametrize("depth", [65, 300, 900])
def test_what_is_cut_says_so(depth: int) -> None:
    assert outside.CUT in json.dumps(outside.fitting(nested(depth)))


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, "{", "NaN", "9" * 5_000, ""])
def test_a_text_that_is_no_json_or_too_much_of_it_raises_one_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(is|has) "):
        outside.loads(text)


@pytest.mark.parametrize("depth", [10, 64, 150, 198, 202, 260, 900])
def test_a_payload_that_is_written_can_be_read(depth: int) -> None:
    """A message of ours around data that was taken before there were limits; a loop of tries would follow."""
    converter = DATA_CONVERTER.payload_converter
    for value in (Reply(id="q", value=nested(depth)), nested(depth)):
        [payload] = converter.to_payloads([value])
        [read] = converter.from_payloads([payload])
        assert "not readable" not in str(read)


# ------------------------------------------------------------------ doors without a run


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_a_graph_that_decides_or_asks_what_is_hostile_is_told_so(value: Any) -> None:
    spec = agent(World().tool("book"), graph=None)
    for decision in (
        {"calls": [{"tool": "book", "arguments": value, "by": "n", "version": "1"}], "then": [], "final": None},
        {"calls": [], "then": [], "final": value},
    ):
        with pytest.raises(BadGraph, match="the graph's decision"):
            decision_of({"decision": decision}, spec)
    with pytest.raises(BadGraph, match=r"interrupt\(\) takes JSON that a person can read; got dict, and it (is|has) "):
        _question(Interrupt(value={"question": value}, id="q"))


def test_a_graph_decides_no_more_calls_than_its_agent_takes() -> None:
    spec = agent(World().tool("book"), max_calls=3)
    wanted = [{"tool": "book", "arguments": {}, "by": "n"}] * 4
    with pytest.raises(BadGraph, match=r"4 calls in one turn, and `max_calls` of agent .* is 3"):
        decision_of({"decision": {"calls": wanted, "then": [], "final": None}}, spec)


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
async def test_hostile_items_of_a_batch_and_input_of_a_run_are_refused(value: Any) -> None:
    spec = BatchSpec("b", "b", Anything, agent(World().tool("book")), lambda *_: [], lambda *_: "")
    if outside.problem(value, outside.MAX_INPUT):
        with pytest.raises(ApplicationError, match=r"the input of one (is|has) "):
            page(spec, [Item(id="one", name="one", input={"a": value})], "")
        with pytest.raises(BadRequest, match=r"the input of agent .* (is|has) "):
            # Refused before anything is asked of a server or a store.
            await start_run(None, None, spec.agent.name, {"what": value}, task_queue="q")  # pyright: ignore
    with pytest.raises(ApplicationError, match="an id of items has to be printable text of at most 200 characters"):
        page(spec, [Item(id="x" * 201, name="one")], "")


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_hostile_words_of_people_are_refused_before_they_are_sent(value: Any) -> None:
    for data in ({"answer": value}, {"arguments": {"a": value}}, {"result": value}):
        with pytest.raises(door.Unfit, match=r"^it (is|has) "):
            door.checked(ApprovalDecision, {"approval_id": "a1", "verdict": "answer", "approver": "x", **data})
