"""Where exceptions become what Temporal acts on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from agents.registry import BrokenAgent, UnknownAgent
from holdfast.reliability.chain import RetryLater
from holdfast.reliability.errors import ErrorType, application_error, backoff, classify, hopeless
from holdfast.reliability.ledger import Fenced
from holdfast.reliability.waiting import NotYet
from holdfast.state.database import StoreUnavailable
from holdfast.tools import NotReady

LONGEST_POLL_S = 60.0
"""What the pause between two questions grows to, from 1 s, where a tool names none."""

KNOWN_TRIES, KNOWN_EVERY_S = 20, 2.0
"""So often, and so far apart, a worker is asked for an agent that none knew so far."""


@contextmanager
def boundary() -> Iterator[None]:
    """Around an activity's body.

    Everything leaves `from None`: Temporal writes the causes of an error into history, and a client's own error may
    hold an address with a key in it. What is not ours (the store is down, a bug) is logged here and tried again.
    """
    try:
        yield
    except RetryLater as later:
        # Also after an error that says stop: a `probe` tool is to be asked whether it happened.
        raise application_error(replace(later.failure, retry=True), later.delay) from None
    except NotYet as wait:
        raise _later(wait.why, wait.delay) from None
    except NotReady as later:
        delay = later.after
        if delay is None:
            delay = backoff(activity.info().attempt + 1, None, random.random(), LONGEST_POLL_S)
        raise _later(later.why, delay) from None
    except Fenced as fenced:
        # The server no longer listens to this attempt. Should it after all (the clocks may disagree), it tries again.
        raise ApplicationError(str(fenced), type=ErrorType.FENCED) from None
    except ApplicationError:
        raise
    except Exception as error:  # noqa: BLE001 - none is swallowed: it leaves, in words that are safe
        if isinstance(error, StoreUnavailable | BrokenAgent):  # no bug: its words say all there is
            activity.logger.warning("tried again: %s", error)
        else:
            activity.logger.exception("activity failed")
        failure = classify(error)
        if hopeless(error):
            words = f"this can never succeed, whatever is tried again: {failure.message}"
            raise ApplicationError(words, type=ErrorType.BAD_DATA, non_retryable=True) from None
        delay = timedelta(seconds=backoff(activity.info().attempt, failure.retry_after, random.random()))
        raise ApplicationError(failure.message, type=failure.type, next_retry_delay=delay) from None


def _later(why: str, delay: float) -> ApplicationError:
    """The same activity is to come again, which history does not see; `why` is what its readers see meanwhile."""
    return ApplicationError(
        why,
        type=ErrorType.NOT_YET,
        next_retry_delay=timedelta(seconds=delay),
        category=ApplicationErrorCategory.BENIGN,
    )


def not_known_yet(error: UnknownAgent) -> ApplicationError:
    """A worker of newer code may know it, or this one a moment later: a deploy, or `up` that takes a new agent."""
    return ApplicationError(
        str(error),
        type=ErrorType.INVALID_INPUT,
        non_retryable=activity.info().attempt >= KNOWN_TRIES,
        next_retry_delay=timedelta(seconds=KNOWN_EVERY_S),
    )


def this_workflow() -> str:
    """The id of the workflow that this activity works for."""
    workflow_id = activity.info().workflow_id
    assert workflow_id is not None, "started by a workflow, never alone"
    return workflow_id
