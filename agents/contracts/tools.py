"""The stages for one document: read, extract, summarise, save. Each stage runs on a task queue of its own.

A stage writes its result into the workspace under its digest; only the digest goes through Temporal's history. The
ledger records each stage under its call's key, and each model call inside it: recorded work is not done again.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationError

from agents.contracts import documents, prompts, terms
from agents.contracts.documents import Unreadable
from agents.contracts.results import json_name, markdown, markdown_name
from agents.contracts.workspace import DiskTrouble, Workspace
from holdfast import Effect, Json, ToolContext, ToolFailed, Undo, tool
from holdfast.contracts.failures import explain

if TYPE_CHECKING:
    from holdfast import ModelAnswer

PATIENT = 7 * 86_400.0
"""Deadline of a stage in seconds, waits included: a model that is down over a weekend fails no document."""
DISK = 1000
"""Retries while the workspace cannot be used: a full disk fails no document before a person can free space."""
REASKS = 2
_stage = partial(tool, effect=Effect.IDEMPOTENT, deadline=PATIENT, retries=DISK, deferrable=False)
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


@_stage(service="workspace", queue="read", timeout=60)
def read(ctx: ToolContext, path: str, workspace: str) -> Json:
    """Read a document's text. Refuses what is no text, empty, or too large."""
    try:
        document = documents.read_document(documents.located(path))
    except Unreadable as refused:
        raise ToolFailed(str(refused)) from None
    except OSError as error:
        raise DiskTrouble(error) from None
    return {
        "text": Workspace(workspace).keep(document.text),
        "sha256": document.sha256,
        "bytes": document.bytes,
        "characters": len(document.text),
        "kind": document.kind,
        "encoding": document.encoding,
    }


@_stage(service="model", queue="extract", timeout=3600)
async def extract(ctx: ToolContext, text: Digest, workspace: str) -> Json:
    """Extract the key terms, part by part, each checked against the text; put together without a model."""
    place = Workspace(workspace)
    parts = documents.parts(place.kept(text))
    found, by, asked = [], set[str](), 0
    for number, part in enumerate(parts, 1):
        said, answer, asks = await _terms_of(ctx, part, number, len(parts))
        found.append(said)
        by.add(answer.label)
        asked += asks
    whole, notes = terms.merged(found)
    if len(parts) > 1:
        notes.insert(0, f"read in {len(parts)} parts; their terms were put together by code")
    kept = place.keep(whole.model_dump_json(indent=1))
    return {"terms": kept, "parts": len(parts), "asked": asked, "by": ", ".join(sorted(by)), "notes": notes}


async def _terms_of(ctx: ToolContext, part: str, number: int, of: int) -> tuple[terms.Terms, ModelAnswer, int]:
    """Returns the terms of one part, the answer and the number of attempts. Raises ToolFailed when none validates."""
    messages, label = prompts.ask_terms(part, number, of), f"terms-{number}"
    problem = ""
    for attempt in range(REASKS + 1):
        answer = await ctx.ask_model(f"{label}-again-{attempt}" if attempt else label, messages, prompts.AS_TERMS)
        try:
            return terms.parse(answer.text, part), answer, attempt + 1
        except ValidationError as error:
            problem = explain(error)[:1000]
            messages = [*messages, *prompts.ask_again(answer.text, problem)]
    raise ToolFailed(f"the model's terms of part {number} did not validate in {REASKS + 1} tries: {problem}")


@_stage(service="model", queue="summarise", timeout=600)
async def summarise(ctx: ToolContext, terms: Digest, workspace: str) -> Json:
    """Summarise the key terms."""
    place = Workspace(workspace)
    answer = await ctx.ask_model("summary", prompts.ask_summary(place.kept(terms)))
    if not (text := answer.text.strip()):
        raise ToolFailed("the model's summary is empty")
    return {"summary": place.keep(text), "by": answer.label}


@_stage(service="workspace", queue="read", timeout=60)
def save(
    ctx: ToolContext, id: str, name: str, workspace: str, document: Json, extracted: Json, summarised: Json
) -> Json:
    """Write the document's result into the workspace, as JSON and as Markdown."""
    place = Workspace(workspace)
    result: Json = {
        "document": name,
        **{key: value for key, value in document.items() if key != "text"},
        "parts": extracted["parts"],
        "notes": extracted["notes"],
        "extracted_by": extracted["by"],
        "summarised_by": summarised["by"],
        "summary": place.kept(summarised["summary"]),
        "terms": json.loads(place.kept(extracted["terms"])),
    }
    place.write(markdown_name(id), markdown(result))
    # Written last, because the index lists the documents that have this file.
    place.write(json_name(id), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return {"saved": json_name(id)}


@save.undo
def delete(ctx: ToolContext, undo: Undo) -> str | None:
    place, id = Workspace(undo.arguments["workspace"]), undo.arguments["id"]
    there = [place.delete(name) for name in (json_name(id), markdown_name(id))]
    return f"{json_name(id)} deleted" if any(there) else None
