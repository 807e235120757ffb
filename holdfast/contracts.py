"""What crosses the workflow boundary: small typed messages, written to history once and read for years.

Every field has a default or is always sent, so that an old history still decodes on newer code. Payloads leave out
fields that hold their default (see `holdfast.temporal`): so a default, once landed, never changes.
"""

from __future__ import annotations

import json
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

Json = dict[str, Any]

MAX_SAID = 100_000
"""Bytes of JSON that a person may give as arguments or as an answer: the run carries them to its end."""


def digest(value: Any) -> str:
    """A short stable digest of JSON data, the same for any order of the keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return sha256(text.encode()).hexdigest()[:16]


def whole(text: str) -> str:
    """The text as UTF-8 can hold it: halves of a character that JSON can spell are joined, or replaced by U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def clip(text: str, limit: int) -> str:
    """The text, whole, cut to `limit` bytes of UTF-8 with a note that says so."""
    text = whole(text)
    raw = text.encode()
    if len(raw) <= limit:
        return text
    kept = raw[:limit].decode(errors="ignore")
    return f"{kept}\n[cut: the result has {len(raw)} bytes, {limit} are shown; ask for less]"


class Effect(StrEnum):
    """What a tool does outside, hence what a crash in the middle of it means. Required of every tool; no default."""

    READ = "read"
    """Changes nothing: repeated freely, and kept out of the ledger unless it fails."""
    IDEMPOTENT = "idempotent"
    """Safe to repeat with the same key (the downstream honours it, or the effect is naturally idempotent)."""
    PROBE = "probe"
    """Not safe to repeat, but the downstream can be asked by key whether it happened."""
    MANUAL = "manual"
    """Neither: an unknown outcome is never repeated and waits for a person."""


# ------------------------------------------------------------------ what an agent is, as data


class StepSpec(BaseModel):
    """A named part of the work that a run has to account for before it may end."""

    name: str
    tools: list[str]
    """All of these done fulfil the step; with `one_of` one of them does."""
    critical: bool = True
    """A critical step without an outcome forbids finishing; one that failed for good fails the run."""
    role: str = ""
    """Who settles the step when it is left pending, e.g. `pharmacist`."""
    title: str = ""
    """As people call it, e.g. `Pharmacy coordination`; else the name."""
    review_s: float = 0.0
    """How long the role takes to settle it as a rule, in seconds, for the ETA; 0: nobody knows."""
    one_of: bool = False
    """One of the tools done fulfils the step. One that failed for good decides nothing while another may still work."""


class ToolPolicy(BaseModel):
    """The rules that the calls of a tool run under, as the workflow has to know them."""

    effect: Effect = Effect.READ
    service: str = ""
    approval: bool = False
    undo: bool = False
    """The tool has a compensation."""
    timeout_s: float = 10.0
    deadline_s: float = 3600.0
    """Schedule-to-close of a call over all its attempts and waits."""
    queue: str = ""
    """The stage that its calls and undos run in: the task queue `<the run's own>.<queue>`; empty: the run's own."""
    put_off: bool = True
    """While its service is down a call is put off beside the turns; False: the turn waits for it, parked.

    False also keeps the tool offered while its service is down: nothing else can be done without it.
    """
    pure: bool = False
    """It only reads, or only asks a model: its call is dropped at once when the run ends, and is never in doubt."""
    role: str = ""
    """Who is asked for the approval of its calls; empty: the role of its step."""


class Profile(BaseModel):
    """The agent's spec as data. Returned by the first turn and carried, so a deploy never changes a run half-way."""

    agent: str
    version: str = "1"
    tools: dict[str, ToolPolicy] = {}
    steps: list[StepSpec] = []
    max_turns: int = 40
    deadline_s: float = 86_400
    """Seconds of work allowed; the clock stands still while a human is asked."""
    turns_per_execution: int = 100
    """Continue-as-new after this many turns of one execution (the server's own suggestion counts as well)."""
    parallel_calls: int = 0
    """Tool calls that are at work at a time; 0: all of a turn's at once, as in runs from before there was a limit."""


# ------------------------------------------------------------------ one turn


class Usage(BaseModel):
    """Model usage. `cost_usd` counts priced calls only; `unpriced` says how many calls had no known price."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    unpriced: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            calls=self.calls + other.calls,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cost_usd=round(self.cost_usd + other.cost_usd, 9),
            unpriced=self.unpriced + other.unpriced,
        )


class ToolCall(BaseModel):
    """One validated tool call of a decision. The model's own id of it stays in the conversation."""

    tool: str
    arguments: Json = {}
    version: str = "1"


class Decision(BaseModel):
    """What one turn decided: calls to make, or the final words of the run. Exactly one of the two."""

    calls: list[ToolCall] = []
    final: str | None = None


class Wait(BaseModel):
    """Not now: call again at `until`. Waiting is a result and uses up no retry."""

    until: datetime
    why: str
    service: str = ""
    """Set when the breaker of this service is open: the call may be put off while other work goes on."""


def key_base(workflow_id: str, first_run_id: str) -> str:
    """What the idempotency keys of a run begin with. New for each run, also when a workflow id is used again."""
    return f"{workflow_id}/{first_run_id[-12:]}"


def absolute(base: str, workflow_id: str) -> str:
    """A key base that begins with a slash is one of the workflow that sends it, which saves history its own name."""
    return workflow_id + base if base.startswith("/") else base


class Question(BaseModel):
    """What a graph asks a person by `interrupt()`. `id`: the interrupt's, as LangGraph names it."""

    id: str
    text: str
    data: Any = None
    """The interrupt's value as JSON, when it is more than a text."""


class Reply(BaseModel):
    """A person's answer to a question, as JSON: what `interrupt()` returns."""

    id: str
    value: Any = None


class OutcomeStatus(StrEnum):
    OK = "ok"
    ERROR = "error"
    """The caller's own mistake (bad arguments, unknown tool, 400): the model can act on it."""
    FAILED = "failed"
    """It certainly did not happen, and trying again will not help (or was tried often enough)."""
    UNKNOWN = "unknown"
    """It may have happened; it is never tried blindly again."""
    REJECTED = "rejected"
    """A human said no."""
    DEFERRED = "deferred"
    """Put off while its service's breaker is open; the platform tries it again."""


class PlanRequest(BaseModel):
    """Input of the plan activity. `base`: the checkpoint that the turn goes on from. `input`: with turn 1 only."""

    agent: str
    key_base: str
    turn: int
    base: str | None = None
    answers: list[str] = []
    """What became of the calls of the turn before, in their order."""
    notices: list[str] = []
    """What the platform has to say to the model."""
    input: Json | None = None
    tenant: str = "default"
    replies: list[Reply] = []
    """All answers that this turn's questions have got so far, oldest first. Not part of what names the turn."""
    statuses: list[OutcomeStatus] = []
    """How the calls of the turn before ended, in their order; empty when all are ok."""
    offered: list[str] = []
    """Tools that the model is offered although their service does not answer: the run cannot end well without them."""
    open: list[str] = []
    """Tools of critical steps without an outcome, which the run cannot end without. In turn 1 the spec says which."""
    tried: bool = False
    """The turn has asked a model before and had to wait: what that cost is in the ledger."""


class PlanResult(BaseModel):
    """A decision with the checkpoint it is stored in, or a wait. `profile` comes with turn 1 only.

    `usage` is that of the whole turn so far, calls that were cut included, however it goes on.
    """

    calls: list[ToolCall] = []
    final: str | None = None
    checkpoint: str = ""
    usage: Usage = Usage()
    model: str = ""
    """The model that answered, as the endpoint names it; empty when it is that of the turn before."""
    profile: Profile | None = None
    wait: Wait | None = None
    notes: list[str] = []
    """What a reader of the run should know: a fallback that answered, tools that were withdrawn."""
    refusal: str = ""
    """The model refuses the turn by its policy: nobody but a person can help."""
    questions: list[Question] = []
    """The turn cannot go on without these answers: ask, then plan the same turn again with `replies`."""
    withdrawn: list[str] = []
    """Tools that the turn did without because their service does not answer."""


# ------------------------------------------------------------------ one tool call


class ToolRequest(BaseModel):
    """Input of the tool and undo activities. The idempotency key is `key_base/seq` (and `…/undo`)."""

    agent: str
    key_base: str
    seq: int
    tool: str
    version: str = "1"
    arguments: Json = {}
    tenant: str = "default"

    @property
    def key(self) -> str:
        return f"{self.key_base}/{self.seq}"


class GiveUp(BaseModel):
    """Input of the activity `give_up`: a call that is not tried any more, and why."""

    request: ToolRequest
    why: str


class Outcome(BaseModel):
    """How one tool call ended."""

    status: OutcomeStatus = OutcomeStatus.OK
    content: str = ""
    """What the model reads."""
    reason: str = ""
    """What a person reads when it did not go well."""
    failures: int = 0
    """Real failures on the way (crashes and deploys are none)."""
    usage: Usage = Usage()
    """Of the tool's own model calls."""
    wait: Wait | None = None
    origin: str = ""
    """What answered when it was not the tool itself: another tool, the last good result and its age, a template."""
    known: str = ""
    """Of an unknown outcome: attempt, worker and time, for the person who settles it."""
    notes: list[str] = []
    """What a reader of the run should know, e.g. that a breaker closed."""


class UndoStatus(StrEnum):
    REGISTERED = "registered"
    UNDONE = "undone"
    NOTHING = "nothing"
    """The effect never happened, so there was nothing to undo."""
    FAILED = "failed"


class UndoOutcome(BaseModel):
    status: UndoStatus
    note: str = ""
    failures: int = 0
    wait: Wait | None = None


# ------------------------------------------------------------------ asking a human


class Verdict(StrEnum):
    APPROVE = "approve"
    REJECT = "reject"
    EDIT = "edit"
    """The call may run, with these other arguments."""
    ANSWER = "answer"
    """Of a question: the answer to it."""
    HAPPENED = "happened"
    """Of an unknown or undone call: it happened, or a person did it (with this result)."""
    DID_NOT = "did_not"
    """It did not happen; the agent may do it again."""


class Approval(BaseModel):
    """A request to a human. Bound to `digest` of the arguments, used once.

    kind `tool`: blocks one call; answered by approve, edit or reject. `outcome`: how did a call end that the platform
    cannot settle; blocks only the end of a critical step; answered by happened or did_not. `refusal`: the model refuses
    the turn by its policy; approve asks it again, reject ends the run. `question`: the agent asks; answered by answer.
    """

    id: str
    kind: Literal["tool", "outcome", "refusal", "question"] = "tool"
    subject: str
    """The tool that wants to run, or ran; of a question its beginning."""
    seq: int
    arguments: Json = {}
    digest: str = ""
    why: str = ""
    evidence: str = ""
    """What the run has done so far, in a line."""
    cost_usd: float = 0.0
    asked_at: datetime
    role: str = ""
    """Whom it is addressed to; empty: anybody who may decide."""
    key: str = ""
    """Idempotency key of the call in question."""
    step: str = ""
    eta: datetime | None = None
    """When the role will have answered, as a rule."""
    about: str = ""
    """Of kind `outcome`: the status of the call that the question shows. The answer holds for that one only."""


class ApprovalDecision(BaseModel):
    """Payload of the Signal and the Update `decide`: plain JSON, typed by hand if need be."""

    approval_id: str
    verdict: Verdict
    approver: str = Field(min_length=1, max_length=200)
    comment: str = Field(default="", max_length=4000)
    digest: str = ""
    """When given it must match the approval's: the decision is then bound to these very arguments."""
    result: Any = None
    """With `happened`: the result that the call would have had, as JSON."""
    arguments: Json | None = None
    """With `edit`: all arguments that the call is to have instead."""
    answer: Any = None
    """With `answer`: a text, or other JSON."""

    @field_validator("arguments", "answer")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        if (size := len(json.dumps(value, ensure_ascii=False).encode())) > MAX_SAID:
            raise ValueError(f"{size} bytes; at most {MAX_SAID}")
        return value


class Message(BaseModel):
    """Payload of the Signal and the Update `message`: something that a person says to a run, as plain JSON."""

    text: str = Field(min_length=1, max_length=10_000)
    by: str = Field(min_length=1, max_length=200)


class Checked(BaseModel):
    """What the activity `check` says of arguments that a person has edited."""

    arguments: Json = {}
    """As the tool takes them, defaults filled in."""
    problem: str = ""
    """Why the tool does not take them; empty when it does."""


class Finding(BaseModel):
    """What a person found out of a call whose end the platform does not know. Input of the activity `settle`."""

    key: str
    happened: bool
    result: Any = None
    by: str
    comment: str = ""


class DecisionReply(BaseModel):
    """What the Updates `decide` and `message` answer; the Signals record the same in the run's status."""

    accepted: bool
    message: str


class DecidedApproval(BaseModel):
    approval: Approval
    decision: ApprovalDecision
    decided_at: datetime


# ------------------------------------------------------------------ a run


class RunOutcome(StrEnum):
    COMPLETED = "completed"
    PARTIAL = "partial"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def unwinds(self) -> bool:
        return self not in (RunOutcome.COMPLETED, RunOutcome.PARTIAL)

    @property
    def exit_code(self) -> int:
        """Exit status of `starter.py run --wait`."""
        return {"completed": 0, "partial": 3, "rejected": 4, "failed": 1, "cancelled": 5}[self.value]


class StepStatus(StrEnum):
    TODO = "todo"
    ACTIVE = "active"
    WAITING = "waiting"
    """Waits for a human's approval."""
    DONE = "done"
    PENDING = "pending"
    """Left for a person (`role`) to settle."""
    FAILED = "failed"
    REJECTED = "rejected"
    UNDONE = "undone"


class StepState(BaseModel):
    name: str
    status: StepStatus = StepStatus.TODO
    critical: bool = True
    role: str = ""
    detail: str = ""
    seq: int | None = None
    """The call that left the step where it is, when it did not go well."""
    title: str = ""
    origin: str = ""
    """What answered when it was not the step's own tool."""
    eta: datetime | None = None


class UndoRecord(BaseModel):
    """One entry of the saga."""

    seq: int
    tool: str
    version: str = "1"
    arguments: Json = {}
    step: str = ""
    status: UndoStatus = UndoStatus.REGISTERED
    note: str = ""


class Stands(BaseModel):
    """An effect that a run has left outside although it was unwound."""

    seq: int
    tool: str
    why: str = ""
    """Why nothing has undone it."""

    def __str__(self) -> str:
        return f"{self.tool} #{self.seq}"


NO_UNDO = "it has no undo"


def not_undone(records: list[UndoRecord]) -> list[Stands]:
    """What the undos that failed have left."""
    return [Stands(seq=r.seq, tool=r.tool, why="its undo failed") for r in records if r.status is UndoStatus.FAILED]


class Pending(BaseModel):
    """Something a person still has to settle after the run."""

    step: str
    role: str
    what: str
    key: str = ""
    """The ledger key of the call in question."""


def percent(steps: list[StepState]) -> int:
    """Share of the steps that are done, 0…100; 0 for an agent without steps."""
    return 100 * sum(step.status is StepStatus.DONE for step in steps) // len(steps) if steps else 0


def awaiting(steps: list[StepState], pending: list[Pending]) -> str:
    """Why a run is partial: '83 % complete, awaiting Pharmacy coordination (pharmacist)'."""
    titles = {step.name: step.title for step in steps}
    left = ((titles.get(each.step) or each.step) + (f" ({each.role})" if each.role else "") for each in pending)
    return f"{percent(steps)} % complete, awaiting {', '.join(left)}"


class Items(BaseModel):
    """Where the items of a batch stand. `failed`: ended in any way but completed. `parked`: those open that wait."""

    total: int = 0
    done: int = 0
    failed: int = 0
    open: int = 0
    parked: int = 0

    @property
    def ended(self) -> int:
        return self.done + self.failed

    @property
    def percent(self) -> int:
        return 100 * self.ended // self.total if self.total else 0


class RunResult(BaseModel):
    """The result of a run: the Temporal result, the details of a failed run, and the `result` column of the store."""

    outcome: RunOutcome
    summary: str = ""
    reason: str = ""
    """Why it did not complete; empty when it did."""
    agent: str = ""
    key_base: str = ""
    steps: list[StepState] = []
    pending: list[Pending] = []
    undone: list[UndoRecord] = []
    usage: Usage = Usage()
    model: str = ""
    turns: int = 0
    calls: int = 0
    failures: int = 0
    human_wait_s: float = 0.0
    decisions: list[DecidedApproval] = []
    trace_id: str = ""
    percent: int = 0
    models: dict[str, int] = {}
    """Turns by the model that answered them, when there was more than one."""
    notes: list[str] = []
    """What was odd on the way, newest last."""
    items: Items | None = None
    """Of a batch."""
    webhook: str = ""
    """Who is told, also of what is repaired after the end."""
    stands: list[Stands] = []
    """Of a run that was unwound: its effects that still stand."""
    since: list[str] = []
    """What was left pending at the run's end and is done by now; `summary` says it then."""
    said: str = ""
    """The agent's last words, once `since` has made them out of date."""


class Phase(StrEnum):
    """What a run is doing; also the search attribute `HoldfastStatus`."""

    STARTING = "starting"
    RUNNING = "running"
    PARKED = "parked"
    """A timer tries again: the model is gone, a service is down, or a rate limit says when."""
    WAITING_HUMAN = "waiting-human"
    COMPENSATING = "compensating"
    ENDED = "ended"


class RunStatus(BaseModel):
    """Answer of the query `status`."""

    agent: str
    phase: Phase
    line: str
    """One sentence: '4/6 steps complete; pharmacy pending pharmacist'."""
    percent: int = 0
    steps: list[StepState] = []
    approvals: list[Approval] = []
    notes: list[str] = []
    """What was ignored or odd, newest last: bad, late and duplicate decisions, parked models."""
    turn: int = 0
    calls: int = 0
    usage: Usage = Usage()
    model: str = ""
    key_base: str = ""
    trace_id: str = ""
    undone: list[UndoRecord] = []
    outcome: RunOutcome | None = None
    items: Items | None = None
    """Of a batch."""
    stands: list[Stands] = []
    """Once it unwinds: its effects that still stand."""


class Standing(BaseModel):
    """An effect of an earlier try of this work that still stands: a call of this tool is answered with it, once."""

    tool: str
    key: str
    """Idempotency key of the earlier call."""
    content: str
    """What the model reads."""


class AgentInput(BaseModel):
    """Input of `AgentWorkflow`. A person may type it: `{"agent": "discharge", "input": {"patient_id": "pat-1"}}`."""

    agent: str
    input: Json = {}
    request_key: str = ""
    requested_by: str = ""
    tenant: str = "default"
    trace_id: str = ""
    standing: list[Standing] = []
    """Set when a failed run is replayed: nothing of the first try is done twice."""
    webhook: str = ""
    """Address that is told when the run needs input and when it has ended; empty: nobody is told."""
    state: dict[str, Any] | None = None
    """Set by continue-as-new only: the dumped `RunState` of `workflows.agent`."""


class RunEnd(BaseModel):
    """Input of the activity that records how a run ended."""

    tenant: str = "default"
    result: RunResult
    input: Json | None = None
    """The run's own, when it failed: its dead letter is replayed from it."""
    requested_by: str = ""
