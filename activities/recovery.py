"""The activities of `RepairWorkflow` and `OrphanSweep`, and of a run that was reset or ends with unknown calls."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

from pydantic import ValidationError
from temporalio import activity

from activities.boundary import boundary, this_workflow
from activities.runs import RunRecords
from activities.tools import settles_within
from holdfast.authoring import registry
from holdfast.authoring.options import ModelAnswer, ModelOptions
from holdfast.authoring.tools import Tool, ToolContext
from holdfast.contracts.data import Json
from holdfast.contracts.failures import ToolFailed, explain
from holdfast.contracts.profile import Effect
from holdfast.contracts.recovery import (
    Action,
    LookBack,
    LookedBack,
    Repair,
    RepairEnd,
    RepairResult,
    RunRef,
    Survey,
    Sweep,
)
from holdfast.contracts.run import (
    NO_UNDO,
    Pending,
    RunEnd,
    RunOutcome,
    RunResult,
    Stands,
    StepState,
    StepStatus,
    UndoRecord,
    not_undone,
)
from holdfast.contracts.tool_call import Outcome, ToolRequest, UndoStatus, absolute
from holdfast.contracts.turn import OutcomeStatus, Usage
from holdfast.contracts.webhooks import Hook
from holdfast.engine import webhooks
from holdfast.engine.runtime import Runtime
from holdfast.recovery.dead_letters import DeadLetters, LetterState
from holdfast.recovery.model import IN_DOUBT, amended, doubtful, left_behind, looked_back, record_of, refusal, standing
from holdfast.recovery.orphans import find_orphans, is_over, webhook_of
from holdfast.reliability.chain import no_bound, protected, unsettled
from holdfast.reliability.ledger import Call, Entry, Settled, State, tool_call
from holdfast.reliability.sent_keys import outside
from holdfast.reliability.waiting import NotYet
from holdfast.state.runs import Runs

TERMINATED = "terminated outside; found by the sweep and undone"


class Repairs:
    def __init__(self, runtime: Runtime, records: RunRecords) -> None:
        self._runtime = runtime
        self._records = records
        self._ledger = runtime.ledger
        self._runs = Runs(runtime.db)
        self._letters = DeadLetters(runtime.db)

    @activity.defn(name="begin_repair")
    async def begin_repair(self, repair: Repair) -> str:
        """Claims the dead letter and reopens the keys to replay. Returns why it must not, or an empty string."""
        with boundary():
            entries = await self._ledger.entries(repair.key_base)
            _, run = await self._result(repair)
            outcome = run.outcome if run else None
            if refused := next(filter(None, (refusal(action, entries, outcome) for action in repair.actions)), ""):
                return refused
            letter = await self._letters.get(repair.letter)
            by = f"replayed by {repair.by}"
            if letter and not await self._letters.claim(letter.id, repair.workflow_id, by):
                letter = await self._letters.get(letter.id) or letter
                return f"{letter.id} is {letter.state} ({letter.note})"
            for action in repair.actions:
                for key in _to_reopen(action, entries):
                    await self._ledger.reopen(key)
            return ""

    @activity.defn(name="record_repair")
    async def record_repair(self, end: RepairEnd) -> RepairResult:
        """Updates the dead letter and the run's stored result. Idempotent."""
        repair = end.repair
        with boundary():
            words, ok = "; ".join(each.words for each in end.ends), all(each.ok for each in end.ends)
            result = await self._amend(end)
            settled = any(each.action.do == "settle" for each in end.ends)
            if ok and all(each.action.happened for each in end.ends if each.action.do == "settle"):
                state = LetterState.SETTLED if settled else LetterState.REPLAYED
                await self._letters.close(repair.letter, state, words)
            else:
                await self._letters.reopen(repair.letter, words, "")
            told = result if any(each.ok for each in end.ends) else None
            hook = await self._hook(webhooks.AMENDED, repair, told)
            return RepairResult(ok=ok, words=words, outcome=result.outcome if result else None, hook=hook)

    @activity.defn(name="find_orphans")
    async def find_orphans(self, sweep: Sweep) -> list[Repair]:
        with boundary():
            return await find_orphans(self._runtime.db, activity.client(), sweep.grace_s)

    @activity.defn(name="survey")
    async def survey(self, repair: Repair) -> Survey:
        """What the run left behind, unless it is open again, or its end was recorded."""
        with boundary():
            run = await self._runs.by_workflow(repair.workflow_id)
            ended = run is not None and run.ended_at is not None
            if ended or not await is_over(activity.client(), repair.workflow_id, repair.key_base):
                return Survey(alive=True)
            rows = left_behind(repair.key_base, await self._ledger.entries(repair.key_base))
            return Survey(
                actions=[action for row in rows if (action := _unwinding(repair.agent, row))],
                webhook=await webhook_of(activity.client(), repair.workflow_id),
            )

    @activity.defn(name="look_back")
    async def look_back(self, of: LookBack) -> LookedBack:
        """Which effects of a run that was reset still stand."""
        with boundary():
            base = absolute(of.key_base, this_workflow())
            return looked_back(of, await self._ledger.entries(base))

    @activity.defn(name="to_undo")
    async def to_undo(self, of: RunRef) -> list[UndoRecord]:
        """The effects that a run may have left and that have an undo, in the order in which they began."""
        with boundary():
            base = absolute(of.key_base, this_workflow())
            rows = reversed(left_behind(base, await self._ledger.entries(base)))
            actions = [action for row in rows if (action := _unwinding(of.agent, row)) and action.do == "undo"]
            return [
                UndoRecord(seq=each.seq, tool=each.tool, version=each.version, arguments=each.arguments)
                for each in actions
            ]

    @activity.defn(name="in_doubt")
    async def in_doubt(self, of: RunRef) -> list[ToolRequest]:
        """The unknown calls of a run that a probe can ask about, the newest first."""
        with boundary():
            base = absolute(of.key_base, this_workflow())
            found = [
                ToolRequest(
                    agent=of.agent,
                    key_base=of.key_base,
                    seq=row.seq,
                    tool=row.name,
                    version=row.version,
                    arguments=row.arguments or {},
                    tenant=of.tenant,
                )
                for row in reversed(doubtful(await self._ledger.entries(base)))
                # A request cannot name the key of a fallback: a person settles that.
                if row.effect == Effect.PROBE and row.seq is not None and row.key == f"{base}/{row.seq}"
            ]
            return [each for each in found if (tool := _tool(of.agent, each.tool)) and not tool.policy.undo]

    @activity.defn(name="ask_probe")
    async def ask_probe(self, request: ToolRequest) -> Outcome:
        """Asks the service whether an unknown call happened, and records the answer. Never makes the call."""
        request = request.model_copy(update={"key_base": absolute(request.key_base, this_workflow())})
        with boundary():
            tool = _tool(request.agent, request.tool)
            if tool is None or tool.probe_function is None:
                return Outcome(status=OutcomeStatus.UNKNOWN, content=f"{request.tool} has no probe to ask")
            try:
                arguments = tool.validate(request.arguments)
            except ValidationError as error:
                return Outcome(status=OutcomeStatus.UNKNOWN, content=f"bad arguments: {explain(error)}")
            call, clock = self._asking(request, tool), self._runtime.guards.clock
            try:
                asked = await clock.now()
                found = await self._ask(call, request, tool, arguments)
                ended = await self._ledger.ended(replace(call, key=request.key))
                happened = found.result is not None
                if found.state is State.DONE and not happened and ended is not None:
                    if call.settles_s is None:
                        return Outcome(status=OutcomeStatus.UNKNOWN, content=f"asked: {no_bound(call)}")
                    if wait := unsettled(call, ended, asked):
                        raise wait
            except NotYet as wait:
                return Outcome(wait=wait.wait(await clock.now()))
            if found.state is not State.DONE:
                return Outcome(status=OutcomeStatus.UNKNOWN, content=f"asked about {tool.name}: {found.error}")
            await self._ledger.settle(request.key, happened, found.result, "its service says that it did not happen")
            words = f"asked about {tool.name}: it {'happened' if happened else 'did not happen'}"
            return Outcome(status=OutcomeStatus.OK if happened else OutcomeStatus.FAILED, content=words)

    @activity.defn(name="record_orphan")
    async def record_orphan(self, end: RepairEnd) -> RepairResult:
        """Records the end of a run that could not do so itself, with its dead letters. Idempotent."""
        repair = end.repair
        with boundary():
            if not await is_over(activity.client(), repair.workflow_id, repair.key_base):
                return RepairResult(ok=True, words="no end was recorded: the run is open after a Reset")
            entries = await self._ledger.entries(repair.key_base)
            result = _orphans_result(end, entries)
            result.webhook = end.webhook
            await self._records.record(repair.workflow_id, RunEnd(tenant=repair.tenant, result=result))
            ok = not result.pending and all(each.ok for each in end.ends)
            words = "; ".join(f"{each.action.tool}: {each.words}" for each in end.ends) or "nothing to undo"
            hook = await self._hook(webhooks.ENDED, repair, result)
            return RepairResult(ok=ok, words=words, outcome=result.outcome, hook=hook)

    def _asking(self, request: ToolRequest, tool: Tool) -> Call:
        """The probe as a read of its own, so that the circuit breaker and the timeout apply to it as to any call."""
        service = registry.service(tool.service)
        return tool_call(
            f"{request.key}/ask",
            request.key_base,
            tool.name,
            Effect.READ,
            request.arguments,
            version=tool.version,
            service=tool.service,
            timeout_s=tool.timeout_s,
            agent=request.agent,
            target=service.target(request.tenant) if tool.service else "",
            rule=service.breaker,
            settles_s=settles_within(tool),
        )

    async def _ask(self, call: Call, request: ToolRequest, tool: Tool, arguments: Json) -> Settled:
        runtime = self._runtime
        workspace = partial(runtime.workspace, request.agent)
        context = ToolContext(outside(request.key), 1, runtime.http, runtime.service_url, _no_model, workspace)

        async def act(attempt: int) -> object:
            return await tool.run_probe(context, arguments)

        return await protected(runtime.guards, call, act)

    async def _result(self, repair: Repair) -> tuple[str, RunResult | None]:
        """The stored result of the run, as text and parsed. None without one, or if another run now has the id."""
        row = await self._runs.by_workflow(repair.workflow_id)
        if row is None or not row.result:
            return "", None
        result = RunResult.model_validate_json(row.result)
        return row.result, result if result.key_base == repair.key_base else None

    async def _amend(self, end: RepairEnd) -> RunResult | None:
        """Writes the repair into the run's result and returns it; None when the run has no result."""
        while True:
            before, result = await self._result(end.repair)
            if result is None:
                return None
            after = amended(result, end.ends)
            if await self._runs.amend(end.repair.workflow_id, before, after.outcome, after.model_dump_json()):
                return after

    async def _hook(self, type: str, repair: Repair, result: RunResult | None) -> Hook | None:
        if result is None or not result.webhook:
            return None
        row = await self._runs.by_workflow(repair.workflow_id)
        request_key = row.request_key if row else ""
        return webhooks.run_is(type, result, repair.workflow_id, request_key, repair.tenant, datetime.now(UTC))


async def _no_model(label: str, messages: list[Json], options: ModelOptions | None = None, /) -> ModelAnswer:
    raise ToolFailed("a probe asks its service, not a model")


def _tool(agent: str, name: str) -> Tool | None:
    try:
        return registry.agent(agent).tool(name)
    except registry.UnknownAgent:
        return None


def _to_reopen(action: Action, entries: list[Entry]) -> list[str]:
    match action.do:
        case "call":
            return [action.key]
        case "undo":
            of = f"{action.key.removesuffix('/undo')}/"
            return [e.key for e in entries if e.kind == "undo" and e.key.startswith(of)]
        case _:
            return []


def _unwinding(agent: str, row: Entry) -> Action | None:
    """What to do about a call of a run that is over; None when nothing can be done."""
    tool = _tool(agent, row.name)
    action = Action(
        do="undo",
        key=row.key,
        seq=row.seq or 0,
        tool=row.name,
        version=row.version,
        arguments=row.arguments or {},
        timeout_s=tool.timeout_s if tool else 10.0,
        queue=tool.queue if tool else "",
    )
    if tool is None or tool.policy.undo:  # without the tool, the undo reports that a person has to do it
        return action
    unknown = row.state in (State.UNKNOWN, State.RESERVED)
    return action.model_copy(update={"do": "ask"}) if unknown and row.effect == Effect.PROBE else None


def _orphans_result(end: RepairEnd, entries: list[Entry]) -> RunResult:
    """The result of a run that could not return one."""
    repair = end.repair
    undos = [record_of(each) for each in end.ends if each.action.do == "undo"]
    specs = registry.agents()[repair.agent].steps if repair.agent in registry.agents() else ()
    for record in undos:
        record.step = next((spec.name for spec in specs if record.tool in spec.tools), "")
    undone = {record.tool for record in undos if record.status is UndoStatus.UNDONE}
    left = {record.seq for record in undos}  # a compensation that failed has a letter of its own
    pending = [Pending(step=e.name, role="", what=IN_DOUBT, key=e.key) for e in doubtful(entries) if e.seq not in left]
    asked = sum(e.kind == "model" for e in entries)
    done = {e.key for e in standing(entries)}
    stands = {e.seq or 0: Stands(seq=e.seq or 0, tool=e.name, why=NO_UNDO) for e in entries if e.key in done}
    stands |= {each.seq: each for each in not_undone(undos)}
    return RunResult(
        outcome=RunOutcome.CANCELLED,
        reason=TERMINATED,
        agent=repair.agent,
        key_base=repair.key_base,
        steps=[
            StepState(
                name=spec.name,
                title=spec.title,
                critical=spec.critical,
                role=spec.role,
                status=StepStatus.UNDONE if undone.intersection(spec.tools) else StepStatus.TODO,
            )
            for spec in specs
        ],
        pending=pending,
        undone=sorted(undos, key=lambda record: record.seq),
        stands=[stands[seq] for seq in sorted(stands)],
        calls=max((e.seq or 0 for e in entries if e.kind == "tool"), default=0),
        failures=sum(e.failures for e in entries),
        usage=Usage(calls=asked, unpriced=asked),
    )
