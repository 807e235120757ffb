"""What people say, checked before it is taken: each field, in words that say what to do."""

from typing import Any

import pytest

from holdfast.contracts import door
from holdfast.contracts.data import Json
from holdfast.contracts.people import ApprovalDecision, Message

YES: Json = {"approval_id": "a1", "verdict": "approve", "approver": "dr.lee"}
REFUSED: dict[str, tuple[Any, Json, str]] = {
    "unknown field": (ApprovalDecision, {**YES, "digst": "x"}, "did you mean digest?"),
    "unlike any field": (ApprovalDecision, {**YES, "zzz" * 100: 1}, "no field 'zzz"),
    "unknown field of a message": (Message, {"text": "hello", "form": "kim"}, "no field 'form'"),
    "no verdict": (ApprovalDecision, {"approval_id": "a1", "approver": "x"}, "verdict: Field required"),
    "a typing error": (
        Message,
        {"text": "hello", "bye": "kim"},
        "did you mean by? (fields: text, by); by: Field required",
    ),
    "a long name": (ApprovalDecision, {**YES, "approver": "x" * 201}, "approver: String should have at most 200"),
    "a long comment": (ApprovalDecision, {**YES, "comment": "x" * 4001}, "comment: String should have at most 4000"),
    "only marks": (ApprovalDecision, {**YES, "approver": "\u0301\ufe0f"}, "approver is blank"),
    "only control characters": (ApprovalDecision, {**YES, "approver": "\x00\x1b\n"}, "approver is blank"),
    "half a character": (ApprovalDecision, {**YES, "approver": "\ud800"}, "half of a character"),
    "a blank comment": (ApprovalDecision, {**YES, "comment": "\u2028 "}, "comment is blank"),
    "printed reason": (ApprovalDecision, {**YES, "comment": "WHAT WAS DONE"}, "comment is still 'WHAT WAS DONE'"),
    "printed dots": (ApprovalDecision, {**YES, "comment": "…"}, "comment is still '…'"),
    "printed answer": (ApprovalDecision, {**YES, "answer": "YOUR ANSWER"}, "answer is still 'YOUR ANSWER'"),
    "blank answer": (ApprovalDecision, {**YES, "answer": "\u200b"}, "answer is blank"),
    "blank message": (Message, {"text": "\u200b\n", "by": "kim"}, "text is blank"),
    "message by nobody": (Message, {"text": "hello", "by": "\u2800"}, "by is blank"),
    "message by the page's name": (Message, {"text": "hello", "by": "YOUR NAME"}, "by is still 'YOUR NAME'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_and_the_words_say_why(name: str) -> None:
    kind, data, says = REFUSED[name]
    with pytest.raises(door.Unfit) as refused:
        door.checked(kind, data)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", ["李医生", "د. لي", "O'Neil", "7", "dr\u200d.lee", "👩\u200d⚕️"])
def test_a_name_in_any_script_is_a_name(name: str) -> None:
    assert door.checked(ApprovalDecision, {**YES, "approver": f" {name}\t"}).approver == name


def test_what_is_not_text_is_an_answer_too() -> None:
    for answer in (False, 0, [], {}, ["YOUR ANSWER"]):
        assert door.checked(ApprovalDecision, {**YES, "answer": answer}).answer == answer
