"""Validates the decisions and messages that people send to a run: before sending, and again on arrival.

No other place validates them: an accepted decision or message is stored and must load forever.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from holdfast.contracts import outside
from holdfast.contracts.failures import explain
from holdfast.contracts.people import ApprovalDecision, Message
from holdfast.contracts.wording import DOTS, WHAT_WAS_DONE, WHY, YOUR_ANSWER, YOUR_NAME, did_you_mean

T = TypeVar("T", ApprovalDecision, Message)

NOT_A_NAME = (YOUR_NAME, "NAME")
"""The placeholders that our pages and help texts print for a name; below, those for a reason and for an answer."""
NOT_A_REASON = (WHY, WHAT_WAS_DONE, DOTS)
NOT_AN_ANSWER = (YOUR_ANSWER, DOTS)

BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Invisible characters that Unicode classifies as letters or symbols."""


class Unfit(ValueError):
    """The data is refused. The message is one line that says which field is wrong, and what to do."""


def visible(text: str) -> bool:
    """Whether the text has a visible character, not only spaces, control characters, marks and zero-width ones."""
    return any(unicodedata.category(each)[0] not in "CMZ" and each not in BLANKS for each in text)


def name(field: str, value: str) -> str:
    """Returns a person's name with its spaces normalized. Raises Unfit for a blank name or a placeholder."""
    if not visible(value):
        raise Unfit(f"{field} is blank: put your own name there")
    value = " ".join(value.split())
    if value in NOT_A_NAME:
        raise Unfit(f"{field} is still {value!r}: put your own name there")
    return value


def reason(field: str, value: str) -> None:
    """Checks a reason or a comment, which may be left out. Raises Unfit for a blank text or a placeholder."""
    if value and not visible(value):
        raise Unfit(f"{field} is blank: put your own words there, or leave it out")
    if value.strip() in NOT_A_REASON:
        raise Unfit(f"{field} is still {value.strip()!r}: put your own words there")


def checked(kind: type[T], data: Mapping[str, Any]) -> T:
    """Validates the data that a person or a program sent, and returns it as this kind. Raises Unfit."""
    if wrong := outside.problem(data):
        raise Unfit(f"it {wrong}")
    problems = []
    if unknown := next((each[:80] for each in data if each not in kind.model_fields), ""):
        fields = ", ".join(kind.model_fields)
        problems.append(f"there is no field {unknown!r}{did_you_mean(unknown, kind.model_fields)} (fields: {fields})")
    said = None
    try:
        said = kind.model_validate(data)
    except ValidationError as error:
        problems.append(explain(error))
    if problems or said is None:
        raise Unfit("; ".join(problems))
    if isinstance(said, Message):
        if not visible(said.text):
            raise Unfit("text is blank: put your message there")
        return said.model_copy(update={"by": name("by", said.by)})
    if isinstance(answer := said.answer, str) and (not visible(answer) or answer.strip() in NOT_AN_ANSWER):
        if not visible(answer):
            raise Unfit("answer is blank: put your own answer there")
        raise Unfit(f"answer is still {answer.strip()!r}: put your own answer there")
    reason("comment", said.comment)
    return said.model_copy(update={"approver": name("approver", said.approver)})
