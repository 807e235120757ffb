"""Maps exceptions to the errors that Temporal acts on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from holdfast.authoring.registry import BrokenAgent, UnknownAgent
from holdfast.authoring.tools import NotReady
from holdfast.contracts.failures import ErrorType
from holdfast.reliability.chain import RetryLater
from holdfast.reliability.errors import application_error, backoff, classify, hopeless
from holdfast.reliability.ledger import Fenced
from holdfast.reliability.waiting import NotYet
from holdfast.state.database import StoreUnavailable

LONGEST_POLL_S = 60.0
"""The longest pause between two polls, which grows from 1 s, for a tool that names no pause."""

KNOWN_TRIES, KNOWN_EVERY_S = 20, 2.0
"""Attempts for an agent that no worker knows yet, and the seconds between them."""


@contextmanager
def boundary() -> Iterator[None]:
    """Wraps an activity's body.

    Every error is raised `from None`: Temporal writes the causes of an error into history, and a client's own error may
    contain an address with a key in it. Unexpected errors (the store is down, a bug) are logged here and tried again.
    """
    try:
        yield
    except RetryLater as later:
        # Also after an error that forbids a retry: the next attempt of a `probe` tool asks whether the call happened.
        raise application_error(replace(later.failure, retry=True), later.delay) from None
    except NotYet as wait:
        raise _later(wait.why, wait.delay) from None
    except NotReady as later:
        delay = later.after
        if delay is None:
            delay = backoff(activity.info().attempt + 1, None, random.random(), LONGEST_POLL_S)
        raise _later(later.why, delay) from None
    except Fenced as fenced:
        # The server no longer accepts this attempt. If it does after all (the clocks may disagree), it tries again.
        raise ApplicationError(str(fenced), type=ErrorType.FENCED) from None
    except ApplicationError:
        raise
    except Exception as error:  # noqa: BLE001 - none is swallowed: each is raised again with a safe text
        if isinstance(error, StoreUnavailable | BrokenAgent):  # no bug, so no stack trace
            activity.logger.warning("tried again: %s", error)
        else:
            activity.logger.exception("activity failed")
        failure = classify(error)
        if hopeless(error):
            words = f"this can never succeed, so it is not tried again: {failure.message}"
            raise ApplicationError(words, type=ErrorType.BAD_DATA, non_retryable=True) from None
        delay = timedelta(seconds=backoff(activity.info().attempt, failure.retry_after, random.random()))
        raise ApplicationError(failure.message, type=failure.type, next_retry_delay=delay) from None


def _later(why: str, delay: float) -> ApplicationError:
    """Asks Temporal to retry the activity, which adds nothing to history; readers see `why` meanwhile."""
    return ApplicationError(
        why,
        type=ErrorType.NOT_YET,
        next_retry_delay=timedelta(seconds=delay),
        category=ApplicationErrorCategory.BENIGN,
    )


def not_known_yet(error: UnknownAgent) -> ApplicationError:
    """The error for an unknown agent, which is tried again: another worker, or this one a moment later, may know it.

    That happens in a deploy, and when `up` takes a new agent.
    """
    return ApplicationError(
        str(error),
        type=ErrorType.INVALID_INPUT,
        non_retryable=activity.info().attempt >= KNOWN_TRIES,
        next_retry_delay=timedelta(seconds=KNOWN_EVERY_S),
    )


def this_workflow() -> str:
    """The id of the workflow that started this activity."""
    workflow_id = activity.info().workflow_id
    assert workflow_id is not None, "started by a workflow, never alone"
    return workflow_id
