"""Detects runs that a query has moved ahead of their history. The worker evicts them from its cache (`client.py`).

A query may wait for a worker because the worker with the run was killed or has dropped the run from its cache. The
query then comes with the run's whole history, which may include events that no workflow task has handled, for example
a Signal. The SDK applies them before it answers (temporalio 1.35) and keeps the run in the cache. The next workflow
task brings only the newer events, so the run has handled in two portions what a replay handles in one. Its commands can
then come in an order that no replay repeats: an Update is accepted at another place, or a completion is handled before
a Signal instead of after it. No other worker can replay such a run (sdk-python issues 1591, 673).

The SDK offers no way to refuse such a query. So the worker answers it, and evicts the run before anything else reaches
the run. The workflow task then replays the run from its history, as on any other worker. That costs one replay.
"""

from __future__ import annotations

from temporalio.bridge.proto.workflow_activation import WorkflowActivation


class Ahead:
    """Watches the activations of one cached run."""

    def __init__(self) -> None:
        self._time = -1
        self._length = 0

    def moved(self, act: WorkflowActivation) -> bool:
        """Whether this activation has events that no workflow task has handled.

        Each workflow task begins with its own event, which sets the time of the workflow. So new events at the old time
        belong to no task. A second activation within a task has the old time too, but no new events.
        """
        before, length = self._time, self._length
        self._time, self._length = act.timestamp.ToNanoseconds(), act.history_length
        return not act.is_replaying and self._time == before and self._length > length
