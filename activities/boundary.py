"""Where exceptions become what Temporal acts on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from temporalio import activity
from temporalio.exceptions import ApplicationError

from holdfast.reliability.chain import RetryLater
from holdfast.reliability.errors import ErrorType, application_error
from holdfast.reliability.ledger import Fenced


@contextmanager
def boundary() -> Iterator[None]:
    """Around an activity's body. Whatever else escapes (the store is down, a bug of ours) Temporal tries again."""
    try:
        yield
    except RetryLater as later:
        raise application_error(later.failure, later.delay) from later
    except Fenced as fenced:
        # The server no longer listens to this attempt. Should it after all (the clocks may disagree), it tries again.
        raise ApplicationError(str(fenced), type=ErrorType.FENCED) from fenced


def this_workflow() -> str:
    """The id of the workflow that this activity works for."""
    workflow_id = activity.info().workflow_id
    assert workflow_id is not None, "started by a workflow, never alone"
    return workflow_id
