"""The contract agent: from a file to terms that are in the text, and what becomes of a text that is none."""

from __future__ import annotations

import asyncio
import csv
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from temporalio.client import WorkflowHandle

from agents.contracts import prompts, script, terms
from agents.contracts.collect import collect
from agents.contracts.documents import Unreadable, html_text, located, parts, read_document
from agents.contracts.results import write_index
from agents.contracts.spec import BATCH, SPEC, ContractsInput
from agents.contracts.workspace import DiskTrouble, Workspace
from holdfast.authoring.batch import BatchContext
from holdfast.authoring.registry import stages
from holdfast.authoring.tools import Undo
from holdfast.contracts.batch import Item
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ToolFailed, ToolRefused
from holdfast.contracts.run import Items, RunOutcome, RunResult
from holdfast.dev.simulation.script import LABEL, decide
from holdfast.engine.starting import BadRequest, start_run
from holdfast.recovery.dead_letters import DeadLetters
from holdfast.state.runs import Runs
from holdfast.testing.model import error, say
from holdfast.testing.stage import Stage, retried, until
from workflows.serving import make_worker

LICENCE = """MIT License

Copyright (c) 2019 Jane Doe

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software, to deal in the Software without restriction.

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND.

This License is governed by the laws of Norway.
"""
QUOTE = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software"


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "raw", "text", "encoding"),
    [
        ("a.txt", b"one\r\ntwo  \r\n", "one\ntwo", "utf-8"),
        ("a.md", "\ufeff# Größe\n".encode(), "# Größe", "utf-8"),
        ("a.txt", "Jörg’s".encode("windows-1252"), "Jörg’s", "windows-1252"),
        ("a.txt", "Größe".encode("utf-16"), "Größe", "utf-16"),
        (
            "a.html",
            b"<title>x</title><style>p{}</style><h1>Terms</h1><p>You may\n use &amp; copy<br>it.<script>1</script>",
            "Terms\n\nYou may use & copy\nit.",
            "utf-8",
        ),
        ("a", b"<!DOCTYPE html><ul><li>one<li>two</ul>", "one\ntwo", "utf-8"),
    ],
)
def test_text_is_read_whatever_it_is_written_in(
    tmp_path: Path, name: str, raw: bytes, text: str, encoding: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    document = read_document(tmp_path / name)
    assert (document.text, document.encoding, document.bytes) == (text, encoding, len(raw))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"text\0text", "binary"),
        (bytes(range(1, 256)), "decoded|binary"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"x" * 1_000_001, "1,000,001 bytes, and at most 1,000,000"),
        (b"<html><script>only()</script></html>", "empty"),
    ],
)
def test_what_is_no_text_is_refused_in_words(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(Unreadable, match=words):
        read_document(tmp_path / "a")


def test_what_is_no_file_is_refused_without_waiting_for_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(Unreadable, match="a folder, a pipe or a device"):
            read_document(path)
    for path in (tmp_path / ("x" * 300), tmp_path / "pipe" / "x", Path("/x\0")):
        with pytest.raises(Unreadable):
            read_document(path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("unit", ["<a ", "<a b='", "<!--", "<![CDATA[", "</", "<a b='>"])
def test_a_page_of_tags_that_never_end_takes_no_worker_with_it(unit: str) -> None:
    html_text(unit * (1_000_000 // len(unit)))


def test_comments_are_no_text_and_a_lonely_bracket_is() -> None:
    page = "<p>one<!-- <p>two</p> --> if a < b <b>c</b></p><!-- three"
    assert html_text(page).strip() == "one if a < b c"


def test_a_file_that_is_gone_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="no such file"):
        read_document(tmp_path / "gone")


@given(st.text(alphabet="ab \n", max_size=400), st.integers(min_value=4, max_value=60))
def test_the_parts_of_a_text_are_all_of_it_and_none_is_too_long(text: str, size: int) -> None:
    found = parts(text, size)
    assert all(0 < len(part) <= size for part in found)
    assert "".join("".join(found).split()) == "".join(text.split())


def test_a_folder_is_listed_without_hidden_files_links_and_the_results_themselves(tmp_path: Path) -> None:
    for name in ("b.txt", "sub/a.txt", ".hidden/x.txt", ".x", "out/documents/r.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    given = ContractsInput(folder=str(tmp_path), workspace=str(tmp_path / "out"))
    items = BATCH.items(given, BatchContext("contracts-x", tmp_path / "home"))
    assert [item.name for item in items] == ["b.txt", "sub/a.txt"]
    assert len({item.id for item in items}) == 2
    with pytest.raises(ToolRefused, match="there is no folder"):
        BATCH.items(ContractsInput(folder=str(tmp_path / "no")), BatchContext("x", tmp_path))


def in_folder(folder: Path, workspace: str, home: Path | None = None) -> list[Item]:
    given = ContractsInput(folder=str(folder), workspace=workspace)
    return list(BATCH.items(given, BatchContext("contracts-x", home or folder.parent / "home")))


def test_results_are_no_documents_whatever_way_leads_to_them(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    (real / "out" / "documents").mkdir(parents=True)
    (real / "out" / "documents" / "r.json").touch()
    (real / "a.txt").touch()
    link.symlink_to(real)
    for folder, workspace in ((link, real / "out"), (real, link / "out"), (real, real / ".." / "real" / "out")):
        assert [item.name for item in in_folder(folder, str(workspace))] == ["a.txt"]
    for workspace in (real, tmp_path, link):
        with pytest.raises(ToolRefused, match="the folder is inside the workspace"):
            in_folder(real, str(workspace))


def test_a_workspace_holds_the_results_of_one_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "LICENSE").touch()
    out = tmp_path / "out"
    for _ in range(2):
        assert len(in_folder(tmp_path / "one", str(out))) == 1
    with pytest.raises(ToolRefused, match=r"holds the results of .*/one: name another one"):
        in_folder(tmp_path / "two", str(out))
    (out / ".documents").write_bytes(b"")  # a worker died as it took the workspace
    assert len(in_folder(tmp_path / "two", str(out))) == 1


def test_a_file_whose_name_is_no_unicode_is_a_document_as_any_other(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in (b"Gr\xf6\xdfe.txt", b"Gr\xf6\xdee.txt", b"one\ntwo\x1b[31m.txt"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text(LICENCE)
    items = [Item.model_validate_json(item.model_dump_json()) for item in in_folder(folder, str(tmp_path / "out"))]
    assert sorted(item.name for item in items) == ["Gr\ufffd\ufffde.txt"] * 2 + ["one\ufffdtwo\ufffd[31m.txt"]
    assert len({item.id for item in items}) == 3
    for item in items:
        path = SPEC.input.model_validate(item.input).model_dump()["path"]
        assert read_document(located(path)).text.startswith("MIT License")


def test_a_folder_that_cannot_be_read_is_a_document_that_fails(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").touch()
    top = here = os.open(folder, os.O_RDONLY)
    for _ in range(20):  # deeper than a path may be long
        os.mkdir("d" * 240, dir_fd=here)
        here = os.open("d" * 240, os.O_RDONLY, dir_fd=here)
    assert top != here
    one, deep = sorted(in_folder(folder, str(tmp_path / "out")), key=lambda item: item.name)
    assert one.name == "a.txt"
    with pytest.raises(Unreadable, match="too long"):
        read_document(located(deep.input["path"]))


def test_collected_texts_have_the_same_names_each_time_and_each_content_once(tmp_path: Path) -> None:
    assert collect(tmp_path / "a", 30) == collect(tmp_path / "b", 30) == 30
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert one == two
    assert len(set(one.values())) == 31
    assert len(json.loads(one[".manifest.json"])) == 30


# ------------------------------------------------------------------ workspace


def test_what_is_kept_is_found_by_its_digest_and_a_changed_file_is_not_taken_for_it(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    digest = place.keep("Größe")
    assert (place.keep("Größe"), place.kept(digest)) == (digest, "Größe")
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    path.write_text("changed")
    with pytest.raises(ToolFailed, match="was changed"):
        place.kept(digest)
    path.unlink()
    with pytest.raises(ToolFailed, match="is gone"):
        place.kept(digest)


def test_half_a_character_of_a_model_is_kept_as_a_question_mark(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    assert place.kept(place.keep("half \ud800")) == "half ?"


def test_the_index_is_made_of_results_and_not_of_what_people_put_beside_them(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    result: Json = {"document": "a.txt", "extracted_by": "m", "notes": [], "terms": {"title": "One"}}
    place.write("documents/a.json", json.dumps(result))
    for name, text in (("notes", "{}"), ("broken", "{"), ("list", "[1]"), ("odd", json.dumps(result | {"terms": 3}))):
        place.write(f"documents/{name}.json", text)
    (tmp_path / "documents" / "folder.json").mkdir()
    for title in ("One", "Two"):
        place.write("documents/a.json", json.dumps(result | {"terms": {"title": title}}))
        write_index(place, Items(total=1, done=1), [], ended=False)
        assert [row["title"] for row in csv.DictReader((tmp_path / "index.csv").open())] == [title]


def test_a_disk_in_trouble_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskTrouble) as caught:
        Workspace(tmp_path / "file").keep("text")  # a file where the folder should be
    assert caught.value.failure.retry


# ------------------------------------------------------------------ terms


def one_clause(quote: str = QUOTE, **more: Any) -> str:
    return json.dumps({"title": "MIT License", "grants": [{"what": "use", "quote": quote}], **more})


def test_a_quote_has_to_be_in_the_text_however_it_is_broken_into_lines() -> None:
    assert terms.parse(f"Here:\n```json\n{one_clause()}\n```", LICENCE).grants[0].quote == QUOTE
    with pytest.raises(ValidationError, match="these words are not in the text"):
        terms.parse(one_clause("You may sell it to anyone"), LICENCE)
    with pytest.raises(ValidationError, match="these words are not in the text"):
        terms.parse(one_clause(" "), LICENCE)
    with pytest.raises(ValidationError, match="does not state 'MIT-0'"):
        terms.parse(one_clause(spdx="MIT-0"), LICENCE)
    with pytest.raises(ValidationError):
        terms.parse("I am sorry", LICENCE)


def test_the_terms_of_parts_are_put_together_without_doubles() -> None:
    one = terms.Terms(parties=["Jane Doe"], grants=[terms.Clause(what="use", quote="may use")])
    two = terms.Terms(title="X", parties=["JANE  DOE", "Joe"], grants=[terms.Clause(what="Use", quote="may  use")])
    whole, notes = terms.merged([one, two, two])
    assert (whole.title, whole.parties, len(whole.grants), notes) == ("X", ["JANE  DOE", "Joe"], 1, [])
    many = terms.Terms(conditions=[terms.Clause(what="must", quote=f"quote {n}") for n in range(99)])
    whole, notes = terms.merged([many])
    assert len(whole.conditions) == terms.MAX_CLAUSES
    assert notes == [f"99 clauses on obligations and conditions; the first {terms.MAX_CLAUSES} are listed"]


def test_the_scripted_model_finds_what_the_text_says_and_labels_its_summary() -> None:
    answer = decide(prompts.ask_terms(LICENCE, 1, 1), [])["content"]
    found = terms.parse(answer, LICENCE)
    assert (found.title, found.parties) == ("MIT License", ["Jane Doe"])
    kinds = ("grants", "conditions", "liability", "governing_law")
    assert [len(getattr(found, kind)) for kind in kinds] == [1, 1, 1, 1]
    assert found.termination == []
    said = decide(prompts.ask_summary(found.model_dump_json()), [])["content"]
    assert said.startswith(f"{LABEL}MIT License of Jane Doe. It grants: permission.")
    assert "laws of Norway" in said
    assert script.decide([{"role": "system", "content": "else"}, {"role": "user", "content": "x"}], []) is None


# ------------------------------------------------------------------ whole runs


@asynccontextmanager
async def workers(stage: Stage) -> AsyncIterator[None]:
    """One of the main queue and one of each stage."""
    async with AsyncExitStack() as stack:
        for name in ("", *stages()):
            await stack.enter_async_context(make_worker(stage.client, stage.queue, stage.runtime, name))
        yield


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / name).write_text(LICENCE.replace("Jane", f"Jane {name}"))
    return folder


async def start(stage: Stage, folder: Path, key: str = "", agent: str = "contracts") -> WorkflowHandle[Any, RunResult]:
    value = {"folder": str(folder), "workspace": str(folder.parent / "out")}
    if agent == "contract":
        value = {"path": str(folder), "workspace": str(folder.parent.parent / "out")}
    started = await start_run(
        stage.client, Runs(stage.runtime.db), agent, value, task_queue=stage.queue, request_key=key
    )
    return stage.client.get_workflow_handle(started.workflow_id, result_type=RunResult)


def answering(extraction: Callable[[int], Any]) -> Callable[[list[Json]], Any]:
    """A model whose n-th answer to a text is given; its summaries are always the same."""

    def answer(messages: list[Json]) -> Any:
        if messages[0]["content"] == prompts.SUMMARISE:
            return say("A short licence.")
        return extraction(sum(each["role"] == "assistant" for each in messages))

    return answer


async def test_every_document_has_its_result_a_row_in_the_index_and_says_who_extracted(
    lite: Stage, texts: Path
) -> None:
    (texts / "empty.txt").touch()
    (texts / "evil.txt").write_text("=cmd|x | [a](b) MIT License governs")
    lite.model.script = answering(lambda n: say(json.dumps({"title": "=1+1 | MIT [x](y)"})))
    async with workers(lite):
        result = await (await start(lite, texts)).result()
    assert result.outcome is RunOutcome.PARTIAL
    assert result.items == Items(total=5, done=4, failed=1)
    assert result.reason == "1 of 5 documents failed: empty.txt (read: the file is empty)"
    out = texts.parent / "out"
    rows = list(csv.DictReader((out / "index.csv").open()))
    assert [row["document"] for row in rows] == ["a.txt", "b.txt", "c.txt", "evil.txt"]
    assert {(row["extracted by"], row["title"]) for row in rows} == {("fake-1", "'=1+1 | MIT [x](y)")}
    index = (out / "index.md").read_text()
    assert "# 4 of 5 documents" in index
    assert "- empty.txt: read: the file is empty" in index
    assert "=1+1 \\| MIT \\[x\\](y)" in index
    page = json.loads(next((out / "documents").glob("a.txt-*.json")).read_text())
    assert (page["document"], page["summary"], page["parts"]) == ("a.txt", "A short licence.", 1)
    assert json.loads((out / "progress.json").read_text())["ended"] is True
    (letter,) = await DeadLetters(lite.runtime.db).find()
    assert letter.details["input"]["name"] == "empty.txt"


async def test_terms_that_do_not_validate_are_asked_again_with_what_is_wrong(lite: Stage, texts: Path) -> None:
    answers = ["no JSON", one_clause("words that nobody wrote"), one_clause()]
    lite.model.script = answering(lambda n: say(answers[n]))
    async with workers(lite):
        result = await (await start(lite, texts / "a.txt", agent="contract")).result()
    assert result.outcome is RunOutcome.COMPLETED
    asked = [messages[-1]["content"] for _, messages in lite.model.requests]
    assert "these words are not in the text" in asked[2]
    assert [key.rpartition("/2/")[2] for key, _ in lite.model.requests[:3]] == [
        "terms-1",
        "terms-1-again-1",
        "terms-1-again-2",
    ]


async def test_terms_that_never_validate_fail_the_document_and_no_other(lite: Stage, texts: Path) -> None:
    def answer(messages: list[Json]) -> Any:
        if messages[0]["content"] == prompts.SUMMARISE:
            return say("Short.")
        return say("never" if "Jane b.txt" in messages[1]["content"] else one_clause())

    lite.model.script = answer
    async with workers(lite):
        result = await (await start(lite, texts)).result()
    assert result.items == Items(total=3, done=2, failed=1)
    assert "b.txt (extract: " in result.reason
    assert "the model's terms of part 1 did not validate in 3 tries" in result.reason


async def test_a_long_text_is_read_in_parts_and_the_result_says_so(lite: Stage, texts: Path) -> None:
    (texts / "a.txt").write_text("\n\n".join([LICENCE] * 200))
    lite.model.script = answering(lambda n: say(one_clause()))
    async with workers(lite):
        result = await (await start(lite, texts / "a.txt", agent="contract")).result()
    saved = json.loads(next((texts.parent / "out" / "documents").glob("*.json")).read_text())
    assert saved["parts"] == 4
    assert saved["notes"] == ["read in 4 parts; their terms were put together by code"]
    assert len(saved["terms"]["grants"]) == 1
    assert result.usage.calls == 5


async def test_while_the_model_is_down_reading_goes_on_and_then_everything_is_done(lite: Stage, texts: Path) -> None:
    for number in range(30):
        (texts / f"n{number:02}.txt").write_text(LICENCE.replace("Jane", f"Jane {number}"))
    up = asyncio.Event()
    lite.model.script = answering(lambda n: say(one_clause()) if up.is_set() else error(401))
    async with workers(lite):
        handle = await start(lite, texts)
        await until(handle, lambda now: now.items is not None and now.items.parked == 33)
        kept = [path for path in (texts.parent / "out" / ".parts").rglob("*") if path.is_file()]
        assert len(kept) == 33  # each text was read, though only 20 are at work at a time
        up.set()
        result = await handle.result()
    assert (result.outcome, result.items) == (RunOutcome.COMPLETED, Items(total=33, done=33))
    assert result.failures == 0


async def test_a_saved_result_is_deleted_again_by_its_undo(tmp_path: Path) -> None:
    place, save = Workspace(tmp_path), SPEC.by_name["save"]
    place.write("documents/x.json", "{}")
    place.write("documents/x.md", "")
    undo = Undo("key", {"id": "x", "workspace": str(tmp_path)}, None)
    assert await save.run_undo(None, undo) == "documents/x.json deleted"  # type: ignore[arg-type] - it uses no context
    assert await save.run_undo(None, undo) is None  # type: ignore[arg-type]
    assert not list((tmp_path / "documents").iterdir())


async def test_a_relative_folder_is_refused_at_the_door(lite: Stage) -> None:
    with pytest.raises(BadRequest, match="has to be an absolute path"):
        await start_run(lite.client, Runs(lite.runtime.db), "contracts", {"folder": "texts"}, task_queue=lite.queue)
    with pytest.raises(BadRequest, match=r"workspace.* has to be an absolute path"):
        given = {"folder": "/texts", "workspace": "out"}
        await start_run(lite.client, Runs(lite.runtime.db), "contracts", given, task_queue=lite.queue)


async def test_a_workspace_that_cannot_be_written_is_waited_for(lite: Stage, texts: Path) -> None:
    out = texts.parent / "out"
    out.touch()  # a file where the folder should be
    lite.model.script = answering(lambda n: say(one_clause()))
    async with workers(lite):
        handle = await start(lite, texts / "a.txt", agent="contract")
        await retried(handle)
        out.unlink()
        result = await handle.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert result.failures >= 1
