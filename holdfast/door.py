"""What people say to a run (a decision, a message), checked at the door: before it is sent, and when it arrives.

Only there. What was taken once is carried and stored, and has to load for ever.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from holdfast import outside
from holdfast.contracts import ApprovalDecision, Message
from holdfast.tools import explain
from holdfast.wording import DOTS, WHAT_WAS_DONE, WHY, YOUR_ANSWER, YOUR_NAME, did_you_mean

T = TypeVar("T", ApprovalDecision, Message)

NOT_A_NAME = (YOUR_NAME, "NAME")
"""What pages and help of ours print in the place of a name; and so on."""
NOT_A_REASON = (WHY, WHAT_WAS_DONE, DOTS)
NOT_AN_ANSWER = (YOUR_ANSWER, DOTS)

BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Fillers that Unicode counts as letters and symbols, and that show nothing."""


class Unfit(ValueError):
    """It is not taken. The message is one line that says which field is wrong, and what to do."""


def visible(text: str) -> bool:
    """Whether there is anything to read: not only spaces, control characters, marks and characters of no width."""
    return any(unicodedata.category(each)[0] not in "CMZ" and each not in BLANKS for each in text)


def name(field: str, value: str) -> str:
    """A person's name, its spaces put in order. Raises Unfit when it is none."""
    if not visible(value):
        raise Unfit(f"{field} is blank: it takes the name of the person who says this")
    value = " ".join(value.split())
    if value in NOT_A_NAME:
        raise Unfit(f"{field} is still {value!r}: put your own name there")
    return value


def reason(field: str, value: str) -> None:
    """Checks a reason or a comment, which may be left out. Raises Unfit for a blank one, or one that is ours."""
    if value and not visible(value):
        raise Unfit(f"{field} is blank: it takes words that people read, or leave it out")
    if value.strip() in NOT_A_REASON:
        raise Unfit(f"{field} is still {value.strip()!r}: put your own words there")


def checked(kind: type[T], data: Mapping[str, Any]) -> T:
    """What a person or program sent, as this kind. Raises Unfit."""
    if wrong := outside.problem(data):
        raise Unfit(f"it {wrong}")
    problems = []
    if unknown := next((each[:80] for each in data if each not in kind.model_fields), ""):
        fields = ", ".join(kind.model_fields)
        problems.append(f"there is no field {unknown!r}{did_you_mean(unknown, kind.model_fields)} (fields: {fields})")
    try:
        said = parsed(kind, data)
    except Unfit as error:
        problems.append(str(error))
        said = None
    if problems or said is None:
        raise Unfit("; ".join(problems))
    if isinstance(said, Message):
        if not visible(said.text):
            raise Unfit("text is blank: it takes what you want to say")
        return said.model_copy(update={"by": name("by", said.by)})
    if isinstance(answer := said.answer, str) and (not visible(answer) or answer.strip() in NOT_AN_ANSWER):
        raise Unfit(f"answer is still {answer.strip()!r}: put your own there" if visible(answer) else "answer is blank")
    reason("comment", said.comment)
    return said.model_copy(update={"approver": name("approver", said.approver)})


def parsed(kind: type[T], data: Mapping[str, Any]) -> T:
    """The same, checked no further than a run did before there was more to check. Raises Unfit."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise Unfit(explain(error)) from None
