"""Error lines for errors that the user can fix."""

from __future__ import annotations

import errno
import os

from holdfast.cli.output import Refused

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)
"""Errors of a write to a stdout that is closed or has no room."""


def nowhere() -> None:
    """Redirects stdout to the null device, so that buffered output is discarded."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def mendable(error: Exception) -> str | None:
    """The error line for an error that the user can fix; None for a bug. Imports late: errors are rare."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, OSError) and error.errno and (error.filename is not None or error.errno in NO_ROOM):
        what = f"cannot use {os.fsdecode(error.filename)}" if error.filename is not None else "cannot write the output"
        if error.filename is None:
            nowhere()
        return f"{what}: {error.strerror}"
    from temporalio.service import RPCError

    from holdfast.application import NameTaken
    from holdfast.authoring.registry import BrokenAgent, UnknownAgent
    from holdfast.contracts import door
    from holdfast.dev.stack import StackFailed
    from holdfast.engine.client import NoServer
    from holdfast.engine.encryption import PayloadUnreadable
    from holdfast.engine.payload_storage import PayloadLost
    from holdfast.engine.starting import BadRequest
    from holdfast.settings import BadProfile, BadStackFile, settings, unfit
    from holdfast.state.database import StoreUnavailable
    from holdfast.state.runs import KeyReused
    from holdfast.state.version import SchemaMismatch

    if isinstance(
        error,
        UnknownAgent
        | BadProfile
        | BadRequest
        | BadStackFile
        | BrokenAgent
        | PayloadLost
        | KeyReused
        | NameTaken
        | NoServer
        | PayloadUnreadable
        | SchemaMismatch
        | StackFailed
        | StoreUnavailable
        | door.Unfit,
    ):
        lacks = {StoreUnavailable: "DATABASE_URL", PayloadUnreadable: "HOLDFAST_ENCRYPTION_KEYS"}.get(type(error))
        return "; ".join(filter(None, (str(error), lacks and settings().kept_by_the_stack(lacks))))
    if isinstance(error, RPCError):
        return (
            f"the Temporal server answered {error.status.name.lower()}: {error.message}; see `uv run starter.py doctor`"
        )
    return unfit(error)
