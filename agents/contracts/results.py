"""What the legal team reads: a page for each document, and the index of all."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence

from agents.contracts.terms import KINDS, Terms, _plain, lines
from agents.contracts.workspace import Workspace
from holdfast.batch import ItemFailure
from holdfast.contracts import Items, Json

DOCUMENTS = "documents"
COLUMNS = ("document", "title", "version", "spdx", "parties", "governing law", "extracted by", "notes", "result")
SHOWN = 3
"""Parties in a row of the index."""


def json_name(id: str) -> str:
    return f"{DOCUMENTS}/{id}.json"


def markdown_name(id: str) -> str:
    return f"{DOCUMENTS}/{id}.md"


def markdown(result: Json) -> str:
    """The page of one document."""
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


def read_results(place: Workspace) -> list[tuple[str, Json]]:
    """The name of each result file and what it says, in the order of the documents' names."""
    files = sorted((place.folder / DOCUMENTS).glob("*.json"))
    found = [(f"{DOCUMENTS}/{path.stem}", json.loads(path.read_text())) for path in files if path.name[0] != "."]
    return sorted(found, key=lambda each: (each[1]["document"], each[0]))


def write_index(place: Workspace, items: Items, failures: Sequence[ItemFailure], ended: bool) -> str:
    """Writes index.md, index.csv and progress.json from the results that are there; where they are, in words."""
    results = read_results(place)
    place.write("index.csv", _csv(results))
    progress = items.model_dump() | {"percent": items.percent, "ended": ended}
    place.write("progress.json", json.dumps(progress, indent=1) + "\n")
    return f"Index: {place.write('index.md', _index(results, items, failures, ended))}"


def _row(stem: str, result: Json) -> tuple[str, ...]:
    terms = result["terms"]
    parties, law = terms["parties"], terms["governing_law"]
    more = f" and {len(parties) - SHOWN} more" if len(parties) > SHOWN else ""
    return (
        result["document"],
        terms["title"],
        terms["version"],
        terms["spdx"],
        "; ".join(parties[:SHOWN]) + more,
        law[0]["quote"] if law else "",
        result["extracted_by"],
        "; ".join(result["notes"]),
        f"{stem}.md",
    )


def _csv(results: Iterable[tuple[str, Json]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_cell(each) for each in _row(stem, result)] for stem, result in results)
    return out.getvalue()


def _cell(text: str) -> str:
    """A spreadsheet takes a cell that begins like this for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text


def _index(results: Sequence[tuple[str, Json]], items: Items, failures: Sequence[ItemFailure], ended: bool) -> str:
    state = "" if ended else ", so far"
    parts = [f"# {items.done} of {items.total} document{'' if items.total == 1 else 's'}{state}"]
    by = Counter(result["extracted_by"] for _, result in results)
    parts.append("\n".join(f"- {count} extracted by {_plain(name)}" for name, count in sorted(by.items())))
    if items.failed:
        more = [f"- … and {items.failed - len(failures)} more"] * (items.failed > len(failures))
        rows = [f"- {_plain(each.name)}: {_plain(each.why)}" for each in sorted(failures, key=lambda each: each.id)]
        parts.append(f"## {items.failed} not done\n\n" + "\n".join(rows + more))
    rows = ["| document | title | version | SPDX | parties | governing law |", "|---|---|---|---|---|---|"]
    for stem, result in results:
        document, title, version, spdx, parties, law, *_ = map(_plain, _row(stem, result))
        rows.append(f"| [{document}]({stem}.md) | {title} | {version} | {spdx} | {parties} | {law[:160]} |")
    return "\n\n".join([part for part in parts if part] + ["\n".join(rows)]) + "\n"
