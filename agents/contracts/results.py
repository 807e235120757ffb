"""Writes what the legal team reads: a page for each document, and an index of all documents."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress

from pydantic import BaseModel, ValidationError

from agents.contracts.terms import KINDS, Terms, _plain, lines
from agents.contracts.workspace import Workspace
from holdfast import ItemFailure, Json
from holdfast.contracts.run import Items

DOCUMENTS = "documents"
COLUMNS = ("document", "title", "version", "spdx", "parties", "governing law", "extracted by", "notes", "result")
Row = tuple[str, ...]
"""One row of the index, in the order of `COLUMNS`."""
SHOWN = 3
"""Most parties in a row of the index."""


def json_name(id: str) -> str:
    return f"{DOCUMENTS}/{id}.json"


def markdown_name(id: str) -> str:
    return f"{DOCUMENTS}/{id}.md"


def markdown(result: Json) -> str:
    """Returns the page of one document."""
    terms = Terms.model_validate(result["terms"])
    head = [f"# {_plain(result['document'])}", _plain(result["summary"])]
    facts = {
        "Title": terms.title,
        "Version": terms.version,
        "SPDX identifier": terms.spdx,
        "Parties": "; ".join(terms.parties),
        "Text": f"{result['characters']:,} characters, {result['kind']}, {result['encoding']}",
        "SHA-256 of the file": result["sha256"],
        "Extracted by": result["extracted_by"],
        "Summarised by": result["summarised_by"],
        "Notes": "; ".join(result["notes"]),
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {_plain(value)} |" for name, value in facts.items() if value)]
    parts = [*head, "\n".join(table)]
    for name, title in KINDS.items():
        clauses = getattr(terms, name)
        parts.append(f"## {title}\n\n{lines(clauses) if clauses else 'The text says nothing.'}")
    return "\n\n".join(parts) + "\n"


class Result(BaseModel):
    """The fields of a result file that the index uses."""

    document: str
    extracted_by: str
    notes: list[str]
    terms: Terms


def read_rows(place: Workspace) -> list[Row]:
    """Returns a row for each result file, in the order of the documents' names. Ignores other files, which people may
    have added."""
    found: list[Row] = []
    for path in (place.folder / DOCUMENTS).glob("[!.]*.json"):
        if path.is_file():
            with suppress(ValidationError):
                result = Result.model_validate_json(path.read_bytes())
                found.append(_row(f"{DOCUMENTS}/{path.stem}", result))
    return sorted(found, key=lambda row: (row[0], row[-1]))


def write_index(place: Workspace, items: Items, failures: Sequence[ItemFailure], ended: bool) -> str:
    """Writes index.md, index.csv and progress.json from the results so far; returns a text that says where they are."""
    rows = read_rows(place)
    place.write("index.csv", _csv(rows))
    progress = items.model_dump() | {"percent": items.percent, "ended": ended}
    place.write("progress.json", json.dumps(progress, indent=1) + "\n")
    return f"Index: {place.write('index.md', _index(rows, items, failures, ended))}"


def _row(stem: str, result: Result) -> Row:
    terms = result.terms
    parties, law = terms.parties, terms.governing_law
    more = f" and {len(parties) - SHOWN} more" if len(parties) > SHOWN else ""
    return (
        result.document,
        terms.title,
        terms.version,
        terms.spdx,
        "; ".join(parties[:SHOWN]) + more,
        law[0].quote if law else "",
        result.extracted_by,
        "; ".join(result.notes),
        f"{stem}.md",
    )


def _csv(rows: Iterable[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_cell(each) for each in row] for row in rows)
    return out.getvalue()


def _cell(text: str) -> str:
    """Quotes a text that a spreadsheet would interpret as a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text


def _index(found: Sequence[Row], items: Items, failures: Sequence[ItemFailure], ended: bool) -> str:
    state = "" if ended else ", so far"
    parts = [f"# {items.done} of {items.total} document{'' if items.total == 1 else 's'}{state}"]
    by = Counter(row[COLUMNS.index("extracted by")] for row in found)
    parts.append("\n".join(f"- {count} extracted by {_plain(name)}" for name, count in sorted(by.items())))
    if items.failed:
        more = [f"- … and {items.failed - len(failures)} more"] * (items.failed > len(failures))
        rows = [f"- {_plain(each.name)}: {_plain(each.why)}" for each in sorted(failures, key=lambda each: each.id)]
        parts.append(f"## {items.failed} not done\n\n" + "\n".join(rows + more))
    rows = ["| document | title | version | SPDX | parties | governing law |", "|---|---|---|---|---|---|"]
    for row in found:
        document, title, version, spdx, parties, law, *_ = map(_plain, row)
        rows.append(f"| [{document}]({row[-1]}) | {title} | {version} | {spdx} | {parties} | {law[:160]} |")
    return "\n\n".join([part for part in parts if part] + ["\n".join(rows)]) + "\n"
