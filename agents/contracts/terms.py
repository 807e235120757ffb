"""The key terms of a legal text: their schema, the check that they are in the text, and how parts are merged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

MAX_CLAUSES = 60
"""Most clauses of one kind in the terms of a whole document."""
KINDS = {
    "grants": "What is granted",
    "conditions": "Obligations and conditions",
    "liability": "Warranty and liability",
    "termination": "Termination",
    "governing_law": "Governing law",
}

Short = Annotated[str, Field(max_length=200)]


def squash(text: str) -> str:
    """Normalizes a text to compare quotes: ignores white space, case, and the shape of quotation marks and dashes."""
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-"})
    return re.sub(r"\s+", " ", text).strip().casefold()


class Clause(BaseModel):
    # The docstring is part of the JSON schema in the prompt: do not change it.
    """One term. A quote that is not in the text is refused: nobody should have to look whether it was made up."""

    model_config = ConfigDict(extra="forbid")

    what: Annotated[str, Field(min_length=1, max_length=200, description="the term in a few words")]
    quote: Annotated[str, Field(min_length=1, max_length=800, description="word for word from the text")]

    @field_validator("quote")
    @classmethod
    def _is_in_the_text(cls, quote: str, info: ValidationInfo) -> str:
        if info.context is not None and not (squash(quote) and squash(quote) in info.context["text"]):
            raise ValueError(f"these words are not in the text: {quote[:80]!r}; quote it word for word")
        return quote


class Terms(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: Short = ""
    version: Short = ""
    spdx: Annotated[Short, Field(description="the SPDX identifier, only if the text states one")] = ""
    parties: Annotated[list[Short], Field(description="licensors and copyright holders, as named")] = []
    grants: list[Clause] = []
    conditions: list[Clause] = []
    liability: list[Clause] = []
    termination: list[Clause] = []
    governing_law: list[Clause] = []

    @field_validator("spdx")
    @classmethod
    def _is_stated(cls, spdx: str, info: ValidationInfo) -> str:
        if info.context is not None and squash(spdx) not in info.context["text"]:
            raise ValueError(f"the text does not state {spdx!r}; leave it empty")
        return spdx


def parse(answer: str, text: str) -> Terms:
    """Parses a model's answer about this text. Raises pydantic's ValidationError."""
    found = re.search(r"\{.*\}", answer, re.S)  # some models put text or a code fence around the JSON
    return Terms.model_validate_json(found[0] if found else answer, context={"text": squash(text)})


def merged(found: Sequence[Terms]) -> tuple[Terms, list[str]]:
    """Merges the terms of a document's parts; returns them with notes on what was left out."""
    notes: list[str] = []

    def first(name: str) -> str:
        return next((value for each in found if (value := getattr(each, name))), "")

    def clauses(name: str) -> list[Clause]:
        unique = {(squash(c.what), squash(c.quote)): c for each in found for c in getattr(each, name)}
        if len(unique) > MAX_CLAUSES:
            notes.append(f"{len(unique)} clauses on {KINDS[name].lower()}; the first {MAX_CLAUSES} are listed")
        return list(unique.values())[:MAX_CLAUSES]

    parties = {squash(party): party for each in found for party in each.parties}
    if len(parties) > MAX_CLAUSES:
        notes.append(f"{len(parties)} parties; the first {MAX_CLAUSES} are listed")
    return Terms(
        title=first("title"),
        version=first("version"),
        spdx=first("spdx"),
        parties=list(parties.values())[:MAX_CLAUSES],
        **{name: clauses(name) for name in KINDS},
    ), notes


def lines(clauses: Iterable[Clause]) -> str:
    """Formats clauses as Markdown."""
    return "\n".join(f"- **{_plain(each.what)}**: “{_plain(each.quote)}”" for each in clauses)


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))
