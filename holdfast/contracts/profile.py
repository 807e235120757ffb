"""What an agent is, as the data that its runs carry."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel


class Effect(StrEnum):
    """The effect class of a tool: what an interrupted call may have left behind. Every tool declares it; no default."""

    READ = "read"
    """Changes nothing: repeated freely, and recorded in the ledger only when it fails."""
    IDEMPOTENT = "idempotent"
    """Safe to repeat with the same key (the service honours the key, or the effect is naturally idempotent)."""
    PROBE = "probe"
    """Not safe to repeat, but the service can be asked by key whether the call happened."""
    MANUAL = "manual"
    """Neither: a call with an unknown outcome is never repeated; a person settles it."""


class StepSpec(BaseModel):
    """A named part of the work that a run must account for before it may end."""

    name: str
    tools: list[str]
    """The step is done when all of these tools are done; with `one_of`, when one of them is."""
    critical: bool = True
    """A run cannot end while a critical step has no outcome, and fails when a critical step fails for good."""
    role: str = ""
    """Who settles the step when it is left pending, e.g. `pharmacist`."""
    title: str = ""
    """The name for people, e.g. `Pharmacy coordination`; by default the name."""
    review_s: float = 0.0
    """Seconds that the role usually takes to settle it, for the ETA; 0: unknown."""
    one_of: bool = False
    """The step is done when one of the tools is done. A tool that failed for good does not fail the step while another
    may still succeed."""


class ToolPolicy(BaseModel):
    """The rules for the calls of a tool, as far as the workflow needs them."""

    effect: Effect = Effect.READ
    service: str = ""
    approval: bool = False
    undo: bool = False
    """The tool has a compensation."""
    timeout_s: float = 10.0
    deadline_s: float = 3600.0
    """Schedule-to-close timeout of a call: all its attempts and waits."""
    queue: str = ""
    """The stage of its calls and compensations: the task queue `<the run's queue>.<queue>`; empty: the run's own."""
    deferrable: bool = True
    """True: while its service is down, a call is deferred and the turns go on. False: the turn is parked with the call.

    False also keeps the tool offered while its service is down, because the run can do nothing without it.
    """
    pure: bool = False
    """It only reads, or only asks a model: its call is dropped when the run ends, and its outcome is never unknown."""
    role: str = ""
    """Who is asked to approve its calls; empty: the role of its step."""


class Profile(BaseModel):
    """The agent's spec as data. The first turn returns it and the run carries it, so a deploy changes no open run."""

    agent: str
    version: str = "1"
    tools: dict[str, ToolPolicy] = {}
    steps: list[StepSpec] = []
    max_turns: int = 40
    deadline_s: float = 86_400
    """Seconds of work allowed; the clock stops while a person is asked."""
    turns_per_execution: int = 100
    """Turns of one execution before continue-as-new, which the server may also suggest earlier."""
    parallel_calls: int = 0
    """Tool calls that run at the same time; 0: no limit."""
