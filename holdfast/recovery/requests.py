"""Starts repairs after the end of a run: replays of dead letters, and findings of people. Checks each request first."""

from __future__ import annotations

from shlex import quote
from typing import Any

from temporalio.client import Client, WorkflowHandle
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError

from holdfast.authoring.registry import UnknownAgent, startable
from holdfast.authoring.registry import agent as find_agent
from holdfast.contracts.profile import Effect
from holdfast.contracts.recovery import Action, Repair, RepairResult
from holdfast.contracts.run import RunOutcome
from holdfast.contracts.webhooks import Delivered, Hook
from holdfast.engine.executions import describe, unknown_run
from holdfast.engine.starting import TASK_TIMEOUT, BadRequest, Started, start_run
from holdfast.recovery.dead_letters import DeadLetter, DeadLetters, LetterKind, LetterState, letter_id
from holdfast.recovery.model import doubtful, refusal, standing
from holdfast.reliability.ledger import Ledger
from holdfast.state.database import Database
from holdfast.state.runs import Runs


async def repair_of(letter: DeadLetter, db: Database, by: str) -> Repair:
    """The replay of a letter of kind `call` or `undo`. Raises BadRequest when it must not be replayed."""
    _refuse_closed(letter)
    details = letter.details
    if letter.kind == LetterKind.STUCK:
        see = f"`uv run starter.py dlq show {letter.id}`"
        raise BadRequest(f"{letter.id} cannot be replayed: its run has not ended; {see} says what to do")
    action = Action(
        do="undo" if letter.kind == LetterKind.UNDO else "call",
        key=letter.key,
        seq=details.get("seq") or 0,
        tool=letter.subject,
        version=details.get("version", "1"),
        arguments=details.get("arguments") or {},
        step=details.get("step", ""),
    )
    action = action.model_copy(update=_limits(letter.agent, letter.subject))
    outcome = RunOutcome(details["outcome"]) if "outcome" in details else None
    if why := refusal(action, await Ledger(db, "").entries(letter.key_base), outcome):
        which = f"{quote(letter.workflow_id)} {quote(letter.key or action.step)}"
        settle = f"uv run starter.py settle {which} --happened | --did-not"
        raise BadRequest(f"{letter.id} cannot be replayed: {why} ({settle})")
    if letter.workflow_id != letter.key_base.rpartition("/")[0]:
        raise BadRequest(f"{letter.id} cannot be replayed: {letter.workflow_id} builds on its effect; wait for its end")
    return Repair(
        workflow_id=letter.workflow_id,
        key_base=letter.key_base,
        agent=letter.agent,
        tenant=letter.tenant,
        by=by,
        letter=letter.id,
        actions=[action],
    )


async def start_repair(client: Client, repair: Repair, task_queue: str) -> WorkflowHandle[Any, RepairResult]:
    """Starts it, under an id that allows one repair of a letter at a time. Raises BadRequest, RPCError."""
    id = f"repair-{repair.letter}"
    try:
        return await client.start_workflow(
            "RepairWorkflow",
            repair,
            id=id,
            task_queue=task_queue,
            task_timeout=TASK_TIMEOUT,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
            static_summary=f"{', '.join(f'{a.do} {a.tool or a.step}' for a in repair.actions)} of {repair.workflow_id}",
            result_type=RepairResult,
        )
    except WorkflowAlreadyStartedError:
        raise BadRequest(
            f"{repair.letter} is being repaired at this moment, as workflow {id}: wait for its end and look again "
            f"with `uv run starter.py dlq show {repair.letter}`"
        ) from None


async def replay_run(client: Client, db: Database, letter: DeadLetter, by: str, task_queue: str) -> Started:
    """Starts the work of a failed run again, with the effects of its earlier tries that still stand.

    The new run's request key is that of the first run with `~1`, `~2`, …. The letter is handed over to the new run,
    whose end closes or reopens it. Raises BadRequest, UnknownAgent, StoreUnavailable, RPCError.
    """
    _refuse_closed(letter)
    startable(letter.agent)
    details, letters = letter.details, DeadLetters(db)
    if details.get("input") is None:
        raise BadRequest(
            f"{letter.id} cannot be replayed: the input of {letter.workflow_id} was not kept; start it anew"
        )
    again = letter.state == LetterState.REPLAYING and await _never_started(client, db, letter)
    number = details["replays"] + (0 if again else 1)
    key = f"{details['request_key']}~{number}"
    if len(key) > 200:
        key = f"{letter.id}~{number}"
    entries = [entry for base in details["tries"] for entry in await Ledger(db, "").entries(base)]
    if unknown := next(iter(doubtful(entries)), None):
        raise BadRequest(
            f"{letter.id} cannot be replayed: it is unknown whether {unknown.name} happened, and a replay could repeat "
            f"it: `uv run starter.py settle {quote(unknown.key_base.rpartition('/')[0])} {quote(unknown.key)}"
            " --happened | --did-not`"
        )
    stands = standing(entries)
    owed = [await letters.get(letter_id(LetterKind.UNDO, f"{e.key.partition('/fb-')[0]}/undo")) for e in stands]
    owed = [each for each in owed if each and each.state in (LetterState.OPEN, LetterState.REPLAYING)]
    if busy := next((each for each in owed if each.state == LetterState.REPLAYING and not again), None):
        raise BadRequest(f"{letter.id} cannot be replayed while {busy.id} is: {busy.note}; wait for its end")
    workflow_id = f"{letter.agent}-{key}"
    note = f"replayed by {by} as {workflow_id}"
    if not await letters.hand_over(letter, workflow_id, details | {"replays": number}, note):
        raise BadRequest(f"{letter.id} was taken by another process just now: `uv run starter.py dlq show {letter.id}`")
    # Suspends the compensations that are still owed: the new run builds on their effects.
    for each in owed:
        await letters.hand_over(each, workflow_id, each.details, f"{workflow_id} builds on its effect")
    try:
        return await start_run(
            client,
            Runs(db),
            letter.agent,
            details["input"],
            task_queue=task_queue,
            request_key=key,
            requested_by=by,
            tenant=letter.tenant,
            standing=stands,
            webhook=details.get("webhook", ""),
        )
    except BadRequest as error:
        await letters.reopen(letter.id, f"cannot be started again: {error}", "")
        for each in owed:
            await letters.give_back(each, each.workflow_id, "")
        raise


async def send_again(
    client: Client, db: Database, letter: DeadLetter, by: str, task_queue: str
) -> WorkflowHandle[Any, Delivered]:
    """Delivers the webhook of a dead letter again, with the same id. Raises BadRequest, RPCError."""
    _refuse_closed(letter)
    hook = Hook.model_validate(letter.details["arguments"] | {"replay": True})
    if not await DeadLetters(db).claim(letter.id, letter.workflow_id, f"sent again by {by}"):
        raise BadRequest(f"{letter.id} was closed just now: `uv run starter.py dlq show {letter.id}`")
    await Ledger(db, "").reopen(hook.key)
    try:
        return await client.start_workflow(
            "DeliveryWorkflow",
            hook,
            id=hook.delivery_id,
            task_queue=task_queue,
            task_timeout=TASK_TIMEOUT,
            id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
            static_summary=f"{hook.type} of {hook.workflow_id}",
            result_type=Delivered,
        )
    except WorkflowAlreadyStartedError:
        await DeadLetters(db).reopen(letter.id, letter.cause, letter.note)
        raise BadRequest(f"{letter.id} is being sent at this moment, as workflow {hook.delivery_id}") from None


async def _never_started(client: Client, db: Database, letter: DeadLetter) -> bool:
    """Whether the run that the letter was handed over to was never started. Raises BadRequest while it is open."""
    run = await Runs(db).by_workflow(letter.workflow_id)
    if run is None or run.started_at is None:
        return True
    try:
        execution = await describe(client, letter.workflow_id)
    except RPCError as error:
        if not unknown_run(error):
            raise
    else:
        if execution.open:
            raise BadRequest(
                f"{letter.id} is being replayed as {letter.workflow_id}: "
                f"`uv run starter.py follow {quote(letter.workflow_id)}`"
            )
    bases = await db.all(
        "SELECT key_base FROM effects WHERE key_base LIKE ? AND kind = 'tool' AND effect <> ?",
        f"{letter.workflow_id}/%",
        Effect.READ,
    )
    if bases and run.ended_at is None:
        raise BadRequest(
            f"{letter.id}: its replay {letter.workflow_id} was terminated and not undone yet: "
            "`uv run starter.py orphans --fix` does that, then replay it again"
        )
    return False


def _refuse_closed(letter: DeadLetter) -> None:
    if letter.state not in (LetterState.OPEN, LetterState.REPLAYING):
        raise BadRequest(f"{letter.id} is closed: {letter.state} ({letter.note})")


def _limits(agent: str, name: str) -> dict[str, Any]:
    """Timeouts and stage of a tool as in the code now; empty, so the defaults, for a tool that no longer exists."""
    try:
        tool = find_agent(agent).tool(name)
    except UnknownAgent:
        return {}
    if tool is None:
        return {}
    # An attempt of a `probe` tool may ask first and then act, each within the tool's timeout.
    return {
        "timeout_s": tool.policy.timeout_s * (2 if tool.effect is Effect.PROBE else 1),
        "deadline_s": tool.policy.deadline_s,
        "queue": tool.policy.queue,
    }
