"""Runs that a query has moved ahead of their history. The worker takes them out of its cache (`holdfast.temporal`).

A query may wait for a worker: the one that had the run was killed, or has dropped it from its cache. The query then
comes with the run's whole history, and so with events that no workflow task has handled yet, for example a Signal that
came meanwhile. The SDK applies them before it answers (temporalio 1.35) and keeps the run in the cache. When the
workflow task comes, the run gets only what is new since: it has seen in two portions what each replay gives it in one.
Its commands then come in an order that no replay repeats, an Update is accepted at another place, a completion is
handled before a Signal instead of after it. No other worker can replay such a run (sdk-python issues 1591, 673).

The SDK offers no way to refuse such a query. So it is answered, and the run is evicted before anything else reaches it:
the workflow task then replays it from its history, as on any other worker. That costs one replay.
"""

from __future__ import annotations

from temporalio.bridge.proto.workflow_activation import WorkflowActivation


class Ahead:
    """Looks at the activations of one run in the cache."""

    def __init__(self) -> None:
        self._time = -1
        self._length = 0

    def moved(self, act: WorkflowActivation) -> bool:
        """Whether this activation has events that no workflow task has handled.

        Each workflow task begins with an event of its own, which sets the time of the workflow: new events at the old
        time are events without a task. A second activation within a task has the old time too, but no new events.
        """
        before, length = self._time, self._length
        self._time, self._length = act.timestamp.ToNanoseconds(), act.history_length
        return not act.is_replaying and self._time == before and self._length > length
