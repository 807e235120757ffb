"""The contract agent's rules for the scripted model: patterns over the text in the request.

They find the usual wording of licences, quote the sentence, and miss any other wording.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from agents.contracts.prompts import EXTRACT, SUMMARISE
from holdfast import Json
from holdfast.dev.simulation.script import say

QUOTE = 600
MOST = 12
"""Most clauses of a kind in one part."""

_RULES: dict[str, list[tuple[str, re.Pattern[str]]]] = {
    kind: [(what, re.compile(pattern, re.I | re.S)) for what, pattern in rules]
    for kind, rules in {
        "grants": [
            ("permission", r"\bpermission (is|to)\b.*\b(granted|use|copy|modify|distribut)"),
            ("licence", r"\b(hereby )?grants?\b.*\b(licen[cs]e|right|permission)"),
            ("use in source and binary form", r"\b(redistribution|use) and (use|redistribution) in source and binary"),
            ("what one may do", r"\byou (may|are free to|are permitted to)\b(?! not\b)"),
            ("public domain", r"\b(public domain|free and unencumbered|waives? all)\b"),
        ],
        "conditions": [
            (
                "keep the notice",
                r"\b(retain|includ|reproduc|appear|preserv)\w*\b.*\bnotice|\bnotice\b.*\b(included|appear)\b",
            ),
            ("no use of names", r"\b(endorse|promote|advertis|publicity)\w*\b"),
            ("mark changes", r"\b(modified|changed) files?\b|\baltered source versions\b|\bprominent notice"),
            ("disclose source", r"\b(corresponding source|complete source|source code)\b.*\b(must|accompan|available)"),
            ("same licence", r"\b(under the (terms of|same)|only under)\b.*\b(this licen[cs]e|same licen[cs]e)\b"),
            (
                "condition",
                r"\b(provided that|must|subject to the following|may not|shall not be (used|misrepresented))\b",
            ),
        ],
        "liability": [
            ("no warranty", r"\bas[ -]is\b|\b(without|no|disclaims? all) (\w+ ){0,3}warrant"),
            ("no liability", r"\b(liable|liability)\b"),
        ],
        "termination": [("termination", r"\bterminat(e|es|ed|ion)\b")],
        "governing_law": [
            ("governing law", r"\bgoverned by\b.*\blaws?\b|\bgoverning law\b"),
            ("jurisdiction", r"\b(exclusive )?jurisdiction of\b|\bcourts? of\b"),
        ],
    }.items()
}
_TITLE = re.compile(r"\b(licen[cs]e|agreement|terms|contract|public domain|notice|lizenz)\b", re.I)
_HOLDER = re.compile(r"^\W{0,4}(?:portions )?copyright:?\s+(?:(?:\(c\)|©|&copy;)\s*)?(.*)$", re.I)
_YEARS = re.compile(r"^(?:[\s,;–-]|\(c\)|©|\d{4}|present|now|copyright|by\b)+", re.I)
_SPDX = re.compile(r"SPDX-License-Identifier:\s*([\w.+-]+(?:\s+(?:AND|OR|WITH)\s+[\w.+-]+)*)")


def decide(messages: Sequence[Json], tools: Sequence[Json]) -> Json | None:
    system = messages[0].get("content") if messages else None
    if tools or len(messages) < 2 or system not in (EXTRACT, SUMMARISE):
        return None
    text = messages[1]["content"]
    if system == SUMMARISE:
        return say(summary(json.loads(text)))
    # Without the label, because a program parses it; the result says elsewhere that it is simulated.
    return {"role": "assistant", "content": json.dumps(terms(text.partition("\n\n")[2]), ensure_ascii=False)}


def terms(text: str) -> Json:
    """Returns the terms that the rules find in a text."""
    found: Json = {"title": _title(text), "version": _version(text), "spdx": "", "parties": _parties(text)}
    if spdx := _SPDX.search(text):
        found["spdx"] = " ".join(spdx[1].split())[:200]
    said = list(_sentences(text))
    for kind, rules in _RULES.items():
        clauses: list[Json] = []
        for sentence in said:
            what = next((what for what, pattern in rules if pattern.search(sentence)), None)
            if what and len(clauses) < MOST:
                clauses.append({"what": what, "quote": _cut(sentence)})
        found[kind] = clauses
    return found


def summary(terms: Json) -> str:
    """Summarises the terms in a few sentences."""
    name = terms.get("title") or "A text without a title"
    version = f", version {terms['version']}" if terms.get("version") else ""
    parties = terms.get("parties") or []
    whose = f" of {', '.join(parties[:3])}{' and others' if len(parties) > 3 else ''}" if parties else ""
    said = [f"{name}{version}{whose}."]
    for kind, words in (("grants", "It grants"), ("conditions", "Conditions"), ("liability", "Liability")):
        clauses: list[Any] = terms.get(kind) or []
        what = ", ".join(dict.fromkeys(each["what"] for each in clauses))
        said.append(f"{words}: {what}." if what else f"{words}: nothing found.")
    said += ["It can be terminated." if terms.get("termination") else "It says nothing of termination."]
    law = terms.get("governing_law") or []
    said += [f"Law: {law[0]['quote'][:200]}" if law else "It names no governing law."]
    return " ".join(said)


def _title(text: str) -> str:
    lines = [" ".join(line.strip(" *#=-_/\t").split()) for line in text.split("\n")[:25]]
    title = next((line for line in lines if line and len(line) < 90 and _TITLE.search(line)), "")
    return (
        ""
        if re.match(r"copyright\b|.*:$|.*\b(under|must|the following)\b|.*\b(or|in|of|the|and|to|a)$", title, re.I)
        else title
    )


def _version(text: str) -> str:
    found = re.search(r"\bversion\s+(\d+(?:\.\d+)*)", text[:2000], re.I)
    return found[1] if found else ""


def _parties(text: str) -> list[str]:
    holders: dict[str, None] = {}
    for line in text.split("\n"):
        if (found := _HOLDER.match(line.strip())) and re.search(r"\d{4}|\(c\)|©", line, re.I):
            holder = re.sub(r"[.,]?\s*all rights reserved.*$", "", _YEARS.sub("", found[1]), flags=re.I)
            if holder := " ".join(holder.split()).strip(" .,;*"):
                holders[holder[:200]] = None
    return list(holders)[:40]


def _sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n|\n\s*(?=[*•-] |\(?[0-9a-z]{1,2}[.)] )", text):
        found = re.split(r"(?<=[.;:])\s+(?=[A-Z(\"'0-9])", " ".join(paragraph.split()))
        yield from (each for each in found if each.count(" ") > 2)  # skips headings


def _cut(sentence: str) -> str:
    return sentence if len(sentence) <= QUOTE else sentence[:QUOTE].rpartition(" ")[0]
