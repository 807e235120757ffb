"""Runs of the shipped agents against a weak model, judged by the model's own record."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle
from temporalio.service import RPCError

from holdfast.contracts.data import Json
from holdfast.contracts.people import Approval, ApprovalDecision, Verdict
from holdfast.contracts.run import RunOutcome, RunResult, RunStatus
from holdfast.contracts.turn import Usage
from holdfast.dev.simulation.scripted_model import ModelRecord
from holdfast.dev.stack import Stack
from holdfast.engine.client import DATA_CONVERTER
from holdfast.engine.starting import start_run
from holdfast.state.opening import open_database
from holdfast.state.runs import Runs

AGENTS = ("discharge", "contract", "triage")
STUCK_S = 600.0
LICENCE = "The Holdfast License\n\nCopyright 2020 Ada Example\n\nPermission is hereby granted to use and copy it.\n"
MAILS = (
    "Can I move my appointment with Dr. Lee to Friday?",
    "I think that you have charged me twice for the X-ray.",
    "Since yesterday my wound is red and hot. What should I do?",
)


@dataclass
class Report:
    outcomes: Counter[str] = field(default_factory=Counter)
    """By agent and outcome."""
    violations: list[str] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    weaknesses: Counter[str] = field(default_factory=Counter)


async def run_all(stack: Stack, agents: Sequence[str], runs: int, at_once: int) -> Report:
    """So many runs of each agent; the stack's model is the weak one."""
    report, gate = Report(), asyncio.Semaphore(at_once)
    client = await Client.connect(stack.temporal_address, data_converter=DATA_CONVERTER)
    text = stack.home / "licence.txt"
    text.write_text(LICENCE)
    store = await open_database(stack.store_url)
    record = ModelRecord(stack.home / "model.db")

    async def one(agent: str, n: int) -> None:
        async with gate:
            queue = stack.environment.get("HOLDFAST_TASK_QUEUE", "holdfast")
            value = given(agent, n, text, stack.home)
            # A key of its own: the runs of one seed meet the same model again.
            started = await start_run(
                client, Runs(store), agent, value, task_queue=queue, request_key=f"weak-{agent}-{n}"
            )
            handle = client.get_workflow_handle(started.workflow_id)
            where = f"{agent} {n}"
            try:
                async with asyncio.timeout(STUCK_S):
                    await through(handle)
            except TimeoutError:
                report.violations.append(f"{where}: not ended after {STUCK_S:g} s")
                report.outcomes[f"{agent} stuck"] += 1
                return
            row = await Runs(store).by_workflow(started.workflow_id)
            if row is None or row.result is None:
                report.violations.append(f"{where}: no result in the store")
                return
            result = RunResult.model_validate_json(row.result)
            judge(report, where, agent, result, record)

    try:
        await asyncio.gather(*(one(agent, n) for n in range(runs) for agent in agents))
    finally:
        await store.close()
    return report


def given(agent: str, n: int, text: Path, home: Path) -> Json:
    if agent == "discharge":
        return {"patient_id": f"pat-{n % 3 + 1}"}
    if agent == "triage":
        return {"text": MAILS[n % len(MAILS)]}
    return {"path": str(text), "workspace": str(home / "results"), "id": f"doc-{n}", "name": f"doc-{n}"}


def judge(report: Report, where: str, agent: str, result: RunResult, record: ModelRecord) -> None:
    prefix = f"{result.key_base}/"
    report.outcomes[f"{agent} {result.outcome}"] += 1
    report.usage += result.usage
    did = Counter(record.weaknesses(prefix))
    report.weaknesses += did
    if result.outcome not in (RunOutcome.COMPLETED, RunOutcome.PARTIAL) and not result.reason:
        report.violations.append(f"{where}: {result.outcome} without a reason")
    if result.outcome is RunOutcome.CANCELLED:
        report.violations.append(f"{where}: cancelled, which nobody asked for")
    if "InternalError" in result.reason or "bug" in result.reason:
        report.violations.append(f"{where}: {result.reason}")
    paid = sum(each.answered_at is not None for each in record.calls(prefix)) + did["cut off"]
    if result.usage.calls != paid:
        report.violations.append(f"{where}: {result.usage.calls} calls counted, the model's record has {paid}")


async def through(handle: WorkflowHandle[object, object]) -> None:
    """Answers what the run asks until it ends."""
    while (await handle.describe()).status is WorkflowExecutionStatus.RUNNING:
        with suppress(RPCError):  # it has ended, or its worker is busy: asked again
            status = await handle.query("status", result_type=RunStatus)
            for each in status.approvals:
                await handle.signal("decide", answer(each))
        await asyncio.sleep(0.2)


def answer(asked: Approval) -> ApprovalDecision:
    verdict = {"tool": Verdict.APPROVE, "outcome": Verdict.DID_NOT, "refusal": Verdict.REJECT}.get(asked.kind)
    if verdict:
        return ApprovalDecision(approval_id=asked.id, verdict=verdict, approver="dr.lee", comment="weak model")
    return ApprovalDecision(approval_id=asked.id, verdict=Verdict.ANSWER, approver="desk", answer="billing")
