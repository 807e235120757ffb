"""The triage agent on a real Temporal server, with its rules as the model: three routes, and the question."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import WorkflowHandle

from agents.triage.graph import TOOLS
from agents.triage.prompts import CLASSIFY
from agents.triage.script import classify, decide
from agents.triage.spec import SPEC
from agents.triage.tools import open_ticket, withdraw_ticket
from holdfast.authoring.tools import ToolContext, Undo
from holdfast.contracts.failures import ToolFailed
from holdfast.contracts.people import Approval
from holdfast.contracts.run import RunOutcome
from holdfast.dev.simulation import script
from holdfast.testing.stage import Stage, cancelled, failure, until
from tests.fixtures.stack import Cli

SENDER = "jo@example.org"


@pytest_asyncio.fixture
async def clinic(lite: Stage) -> AsyncIterator[Stage]:
    """A worker, and the scripted model's rules behind the model's endpoint."""
    lite.model.script = lambda messages: script.decide(messages, [])
    async with lite.worker():
        yield lite


@pytest.fixture
def home(lite: Stage) -> Path:
    """The agent's workspace."""
    return lite.runtime.workspace("triage")


async def start(clinic: Stage, text: str) -> WorkflowHandle[Any, Any]:
    return await clinic.start(SPEC, {"text": text, "sender": SENDER})


async def asked(run: WorkflowHandle[Any, Any], approval_id: str) -> Approval:
    """The request to a person with this id, once it is the one that is open."""
    now = await until(run, lambda status: [each.id for each in status.approvals] == [approval_id])
    return now.approvals[0]


async def says(run: WorkflowHandle[Any, Any], approval_id: str, **decision: Any) -> None:
    await run.signal("decide", {"approval_id": approval_id, "approver": "ann", **decision})


def files(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in folder.glob("*.json")]


async def test_a_clinical_message_becomes_a_ticket_and_no_reply(clinic: Stage, home: Path) -> None:
    result = await (await start(clinic, "Since this morning I have chest pain.")).result()
    (ticket,) = files(home / "tickets")
    assert (ticket["desk"], ticket["urgency"], ticket["details"]) == (
        "nurses",
        "now",
        "Since this morning I have chest pain.",
    )
    assert (result.outcome, result.turns, result.calls) == (RunOutcome.COMPLETED, 2, 1)
    assert result.usage.calls == len(clinic.model.requests) == 3, "one to classify, two of the desk"
    assert files(home / "outbox") == []


async def test_a_message_about_a_visit_becomes_a_ticket_and_an_approved_reply(clinic: Stage, home: Path) -> None:
    run = await start(clinic, "Please move my appointment to Friday.")
    request = await asked(run, "a3")
    assert (request.subject, request.arguments["to"], files(home / "outbox")) == ("send_reply", SENDER, [])
    await says(run, "a3", verdict="approve")
    assert (await run.result()).outcome is RunOutcome.COMPLETED
    assert [each["desk"] for each in files(home / "tickets")] == ["scheduling"]
    (reply,) = files(home / "outbox")
    assert reply["text"].startswith(script.LABEL + "The scheduling desk has your message.")


async def test_cancelling_withdraws_the_ticket(clinic: Stage, home: Path) -> None:
    run = await start(clinic, "I want to cancel my visit.")
    await asked(run, "a3")
    assert len(files(home / "tickets")) == 1
    await run.cancel()
    await cancelled(run)
    assert [each.tool for each in (await clinic.stored(run)).undone] == ["open_ticket"]
    assert files(home / "tickets") == files(home / "outbox") == []


async def test_a_message_about_an_invoice_gets_a_reply_only(clinic: Stage, home: Path) -> None:
    run = await start(clinic, "May I settle my invoice later?")
    request = await asked(run, "a2")
    assert "three instalments" in request.arguments["text"]
    await says(run, "a2", verdict="reject", comment="I call her")
    assert "I call her" in (await run.result()).summary
    assert files(home / "tickets") == files(home / "outbox") == []


async def test_a_message_that_got_neither_a_ticket_nor_a_reply_is_not_completed(clinic: Stage) -> None:
    clinic.model.script = lambda m: {"role": "assistant", "content": "billing" if m[0]["content"] == CLASSIFY else "ok"}
    result = await failure(await start(clinic, "May I settle my invoice later?"))
    words = "critical step gone: answer: the model ended without calling `open_ticket` or `send_reply`"
    assert result.reason == f"{words}; it never called a tool"


async def test_a_person_says_the_desk_when_the_model_is_unsure(clinic: Stage, home: Path) -> None:
    run = await start(clinic, "Hello, it is about my mother.")
    request = await asked(run, "q1")
    assert (request.kind, request.why, request.role) == ("question", "Which desk is this message for?", "front desk")
    assert request.arguments["desks"] == ["clinical", "appointments", "billing"]
    await says(run, "q1", verdict="answer", answer="the kitchen")
    assert (await asked(run, "q1-2")).why == "'the kitchen' is no desk. Which of these is the message for?"
    await says(run, "q1-2", verdict="answer", answer="clinical")
    result = await run.result()
    assert result.outcome is RunOutcome.COMPLETED
    assert [each["urgency"] for each in files(home / "tickets")] == ["today"]
    assert result.usage.calls == len(clinic.model.requests) == 3, "the model was asked once to classify"


def test_it_runs_at_once_in_the_embedded_stack(cli: Cli) -> None:
    ran = cli("run", "triage", "--input", '{"text": "I feel dizzy since I take the new tablets."}', "--wait", "--json")
    assert ran.returncode == 0, ran.stderr
    assert script.LABEL + "The nurses have a ticket, urgency today." in ran.stdout


def test_words_of_two_desks_make_the_rules_unsure() -> None:
    assert classify("The invoice for my appointment is wrong") == "unsure"
    assert classify("Is the invoice right?") == "billing"
    assert decide([{"role": "system", "content": "another agent"}], []) is None


def test_each_desk_offers_its_own_tools_only() -> None:
    assert {tool.name for desk in TOOLS.values() for tool in desk} == set(SPEC.by_name)
    assert TOOLS["clinical"] == (open_ticket,)


async def test_a_ticket_that_was_withdrawn_is_not_opened_by_an_attempt_that_wakes(tmp_path: Path) -> None:
    def context(key: str) -> ToolContext:
        return ToolContext(key, 1, None, str, None, lambda: tmp_path)  # type: ignore[arg-type]

    ticket = {"desk": "nurses", "urgency": "today", "title": "t", "details": "d"}
    undo = Undo(key="k/1", arguments=ticket, result=None)
    assert await withdraw_ticket(context("k/1/undo"), undo) is None
    with pytest.raises(ToolFailed, match="was withdrawn before it was written"):
        await open_ticket.call(context("k/1"), ticket)
    await open_ticket.call(context("k/2"), ticket)
    undo = Undo(key="k/2", arguments=ticket, result=None)
    assert await withdraw_ticket(context("k/2/undo"), undo) == await withdraw_ticket(context("k/2/undo"), undo)
    assert files(tmp_path / "tickets") == []
