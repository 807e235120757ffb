"""Crash points: named places in the code where a test can kill or freeze a worker.

`HOLDFAST_FAULT="<kill|freeze>:<POINT>@<where>"` in a worker's environment arms one point; `where` is the tool or the
step of the call (`*` for any). The point fires once per process. With `HOLDFAST_FAULT_TRACE=<file>` the worker appends
every point that it passes, one `POINT@where` per line; the kill sweep lists its cases from such a trace of an
undisturbed run. A point that is not armed, as always in production, costs two comparisons with None.
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
    """The model has answered, nothing is recorded: only here can a crash make a model call be paid twice."""
    MODEL_RECORDED = "model-recorded"
    NODE_DONE = "node-done"
    """A node has read the turn's decision from the model's recorded answer; no checkpoint has it yet."""
    DECIDED = "decided"
    """The decision is checkpointed, not yet reported to the workflow."""
    LIMITED = "limited"
    """The call has its rate limit tickets; its real usage is not known yet."""
    PROBING = "probing"
    """This call is the probe of an open circuit breaker. `where` is the breaker's target."""
    RESERVED = "reserved"
    PROBED = "probed"
    """The service has answered whether a call in doubt happened."""
    EFFECT_DONE = "effect-done"
    RECORDED = "recorded"
    """Recorded, not yet reported to the workflow."""
    WAITING = "waiting"
    """The run waits for a person and no call is in flight. The test raises it, as workflow code does no I/O."""
    FINDING_RECORDED = "finding-recorded"
    """A person's finding on how a call ended is in the ledger, not yet reported to the workflow."""
    UNDO_STARTED = "undo-started"
    UNDO_RESERVED = "undo-reserved"
    UNDO_DONE = "undo-done"
    UNDO_RECORDED = "undo-recorded"
    LETTERS_WRITTEN = "letters-written"
    """The result and the dead letters are in the store, not yet reported to the workflow."""
    END_RECORDED = "end-recorded"
    """The result is in the store, not yet reported to the workflow."""


strike: Callable[[int, signal.Signals], None] = os.kill
"""Kills or freezes this process. A test harness that has to choose the moment replaces it."""

_armed: tuple[str, str, str] | None = None
_trace: Path | None = None


def arm(fault: str = "", trace: str = "") -> None:
    """Arms this process. Raises ValueError for an unknown action or point."""
    global _armed, _trace
    if fault:
        action, _, rest = fault.partition(":")
        point, _, where = rest.partition("@")
        if action not in ("kill", "freeze"):
            raise ValueError(f"HOLDFAST_FAULT: unknown action {action!r}: use kill or freeze")
        _armed = (action, Point(point), where or "*")
    _trace = Path(trace) if trace else None


def arm_from_environment() -> None:
    arm(os.environ.get("HOLDFAST_FAULT", ""), os.environ.get("HOLDFAST_FAULT_TRACE", ""))


def reached(point: Point, where: str) -> None:
    """Marks a crash point: kills or freezes the process when this point is armed."""
    global _armed
    if _armed is None and _trace is None:
        return
    if _trace is not None:
        with _trace.open("a") as out:
            out.write(f"{point}@{where}\n")
    if _armed is not None and _armed[1] == point and _armed[2] in ("*", where):
        action, _armed = _armed[0], None
        strike(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
