"""Crash points: the places where dying hurts most, by name, so that a test can kill or freeze a worker right there.

Armed by `HOLDFAST_FAULT="<kill|freeze>:<POINT>@<where>"` in one worker's environment; `where` is the tool or the step
of the call (`*` for any). Each point fires once per process. `HOLDFAST_FAULT_TRACE=<file>` appends every point that is
passed, one `POINT@where` a line: the kill sweep enumerates its cases from such a trace of an undisturbed run.
Unarmed, which is always in production, a point costs one comparison with None.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path


class Point(StrEnum):
    TURN_STARTED = "turn-started"
    MODEL_RESERVED = "model-reserved"
    MODEL_ANSWERED = "model-answered"
    """Answered, not recorded: the one place where a model call is paid twice."""
    MODEL_RECORDED = "model-recorded"
    NODE_DONE = "node-done"
    """The model node's checkpoint is written, the check node has not run."""
    DECIDED = "decided"
    """The decision is checkpointed, not yet reported to the workflow."""
    LIMITED = "limited"
    """A rate limit has let the call in and does not know yet what it uses."""
    PROBING = "probing"
    """This call is the probe of an open breaker. `where` is the breaker's target."""
    RESERVED = "reserved"
    PROBED = "probed"
    """The other side has said whether a doubtful call happened."""
    EFFECT_DONE = "effect-done"
    RECORDED = "recorded"
    """Recorded, not yet reported to the workflow."""
    WAITING = "waiting"
    """A human is asked and nothing is in flight. Raised from outside: workflow code does no I/O."""
    FINDING_RECORDED = "finding-recorded"
    """What a person says of a call's end is in the ledger, not yet reported to the workflow."""
    UNDO_STARTED = "undo-started"
    UNDO_RESERVED = "undo-reserved"
    UNDO_DONE = "undo-done"
    UNDO_RECORDED = "undo-recorded"
    LETTERS_WRITTEN = "letters-written"
    """The result and the dead letters are in the store, not yet reported to the workflow."""
    END_RECORDED = "end-recorded"
    """The result is in the store, not yet reported to the workflow."""


strike: Callable[[int, signal.Signals], None] = os.kill
"""How a point hits this process. A harness that has to choose the moment puts its own here."""

_armed: tuple[str, str, str] | None = None
_trace: Path | None = None


def arm(fault: str = "", trace: str = "") -> None:
    """Arms this process. Raises ValueError for a point that is not one."""
    global _armed, _trace
    if fault:
        action, _, rest = fault.partition(":")
        point, _, where = rest.partition("@")
        if action not in ("kill", "freeze"):
            raise ValueError(f"HOLDFAST_FAULT: {action!r} is neither kill nor freeze")
        _armed = (action, Point(point), where or "*")
    _trace = Path(trace) if trace else None


def arm_from_environment() -> None:
    arm(os.environ.get("HOLDFAST_FAULT", ""), os.environ.get("HOLDFAST_FAULT_TRACE", ""))


def reached(point: Point, where: str) -> None:
    """Marks a crash point; dies or freezes here when this one is armed."""
    global _armed
    if _armed is None and _trace is None:
        return
    if _trace is not None:
        with _trace.open("a") as out:
            out.write(f"{point}@{where}\n")
    if _armed is not None and _armed[1] == point and _armed[2] in ("*", where):
        action, _armed = _armed[0], None
        strike(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
