"""What `follow` shows of a run or a batch: its status and its open requests to people."""

from __future__ import annotations

import asyncio
import shlex

from rich.console import Group
from rich.live import Live
from rich.text import Text
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from holdfast.cli import view
from holdfast.cli.output import err, out, print_json
from holdfast.contracts.run import RunStatus
from holdfast.engine.executions import OPEN, listed

MOST_ASKING = 20
LOOK_S = 2.0


class Follower:
    """At a terminal, a live display; in a pipe, one line per change; with JSON, one object per change."""

    def __init__(self, client: Client, run: str, as_json: bool, live: Live) -> None:
        self._client = client
        self._run = run
        self._as_json = as_json
        self._live = live
        self._status: RunStatus | None = None
        self._asking: list[str] = []
        self._told: set[str] = set()

    def show(self, status: RunStatus | str) -> None:
        if isinstance(status, str):
            err.print(Text(status, "dim"))
            return
        self._status = status
        if not (self._as_json or out.is_terminal):
            out.print(view.plain_line(status), markup=False)
        self._ask({each.id: f"{each.subject} ({each.id})" for each in status.approvals})

    async def look_for_questions(self) -> None:
        """For a batch, finds the runs that wait for a person: its status does not name them, visibility does."""
        waits = f'ParentWorkflowId = "{self._run}" AND HoldfastStatus = "waiting-human"'
        while True:
            if self._status and self._status.items:
                try:
                    asking = [each.id async for each in listed(self._client, f"{OPEN} AND {waits}", MOST_ASKING)]
                except RPCError as error:
                    if error.status is RPCStatusCode.INVALID_ARGUMENT:
                        return  # the server lacks our search attributes
                    raise
                if sorted(asking) != self._asking:
                    self._asking = sorted(asking)
                    self._ask({each: f"{each} asks a person" for each in self._asking})
            await asyncio.sleep(LOOK_S)

    def _ask(self, asks: dict[str, str]) -> None:
        """Shows the status and the open requests; in a pipe, only new requests."""
        assert self._status is not None
        see = f"uv run starter.py approvals {shlex.quote(self._run)}"
        if self._as_json:
            asking = {"asking": self._asking} if self._asking else {}
            print_json({"workflow_id": self._run, "status": self._status} | asking)
        elif out.is_terminal:
            picture = view.status_view(self._run, self._status), *view.asking_view(self._asking, see)
            self._live.update(Group(*picture), refresh=True)
        else:
            for each in asks.keys() - self._told:
                err.print(f"asks: {asks[each]}; to read and answer it: {see}", markup=False)
            self._told |= asks.keys()
