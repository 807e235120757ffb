"""`starter.py mcp`: an MCP server that offers the run commands as tools.

The tools use the functions of the commands, with the same checks. Over stdio, stdout carries the protocol, so nothing
here prints to it.
"""

from __future__ import annotations

import hmac
import json
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import redirect_stdout
from functools import wraps
from typing import Annotated, Any, Literal

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import BaseModel, Field
from temporalio.client import Client

from holdfast.authoring.registry import agents, batches
from holdfast.cli import runs
from holdfast.cli.lookup import find, find_running, link
from holdfast.cli.output import Refused
from holdfast.contracts.data import Json
from holdfast.contracts.people import Approval, DecisionReply, Verdict
from holdfast.contracts.run import RunResult, RunStatus
from holdfast.engine.client import connect
from holdfast.settings import settings

LOOKS = ToolAnnotations(read_only_hint=True)
STARTS = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True)
DECIDES = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=False)

INSTRUCTIONS = """\
Runs agents durably: a run survives crashes and may take days. Start one with start_run, which returns at once. Check it
with status; read result when its phase is `ended`. When a run waits for a person, status and approvals show it.
"""

Run = Annotated[str, Field(description="The run's id, as start_run returned it.")]


class StartedRun(BaseModel):
    run: str = Field(description="The run's id, which the other tools take.")
    new: bool = Field(description="False: this request key was used before, and this is the run it started.")
    url: str = Field(description="The run's page in Temporal's Web UI, for a person.")


class Waiting(BaseModel):
    run: str
    approval: Approval


class Approvals(BaseModel):
    waiting: list[Waiting]
    notes: list[str] = Field(description="Runs that could not be asked, and why.")


class Platform:
    """The tools. by: who starts runs and decides. The first call that needs the connection opens it."""

    def __init__(self, by: str) -> None:
        self._by = by
        self._client: Client | None = None

    async def connected(self) -> Client:
        if self._client is None:
            self._client = await connect()
        return self._client

    async def start_run(
        self,
        agent: Annotated[str, Field(description="The agent's name; see the list above.")],
        input: Annotated[Json, Field(description="The agent's input, by its input schema.")],
        request_key: Annotated[
            str,
            Field(
                min_length=1,
                max_length=200,
                description="Names this request, e.g. `ward-3-bed-2-2026-11-21`. The same key again returns the same "
                "run and starts nothing, so repeat it when you are not sure that a start went through.",
            ),
        ],
    ) -> StartedRun:
        client = await self.connected()
        started = await runs.begin(client, agent, input, request_key, self._by)
        return StartedRun(run=started.workflow_id, new=started.new, url=link(client, started.workflow_id))

    async def status(self, run: Run) -> RunStatus:
        """Get what a run is doing now: phase, steps, what it waits for. When the phase is `ended`, read result."""
        client = await self.connected()
        found, _, complaint = await runs.look(client, await find(client, run))
        if found is None:
            raise Refused(f"{run} cannot be asked: {complaint or 'only its request is on record'}")
        return found

    async def result(self, run: Run) -> RunResult:
        """Get how a run ended: outcome, summary, pending steps and their roles, undone effects. Fails while it runs."""
        return await runs.ended(await self.connected(), run)

    async def approvals(
        self, run: Annotated[str, Field(description="One run; empty: all that are open.")] = ""
    ) -> Approvals:
        """List the requests that wait for a person, with their arguments, reasons and roles."""
        found, notes = await runs.waiting(await self.connected(), run or None)
        return Approvals(waiting=[Waiting(run=each, approval=approval) for each, approval in found], notes=notes)

    async def decide(
        self,
        run: Run,
        approval_id: Annotated[str, Field(description="The approval's `id`, from approvals.")],
        digest: Annotated[
            str, Field(min_length=1, description="The approval's `digest`: binds the answer to what was shown.")
        ],
        verdict: Annotated[
            Literal["approve", "reject", "edit", "answer", "happened", "did_not"],
            Field(
                description="By the approval's kind: for tool `approve`, `reject`, or `edit` with other arguments; for "
                "refusal `approve` or `reject`; for question `answer`; for outcome, whether the call `happened` or "
                "`did_not`."
            ),
        ],
        comment: Annotated[
            str, Field(description="Kept with the decision; the agent reads it. Required with reject and did_not.")
        ] = "",
        arguments: Annotated[Json | None, Field(description="With edit: all arguments of the call.")] = None,
        answer: Annotated[str, Field(description="With answer: the answer.")] = "",
    ) -> DecisionReply:
        """Answer an approval in the name of the person whom this server acts for. Ask that person first, every time.

        Never answer one for a run that you started without having shown that person what it wants to do.
        """
        if verdict in ("reject", "did_not") and not comment.strip():
            raise Refused(f"{verdict} needs a comment: say why, it is acted on")
        handle = (await find_running(await self.connected(), run)).handle
        more = {"digest": digest, "arguments": arguments, "answer": answer or None}
        decision = runs.checked_decision(approval_id, Verdict(verdict), self._by, comment, **more)
        reply = (await runs.send(handle, decision)).reply
        if not reply.accepted:
            raise Refused(reply.message)
        return reply


def make_server(by: str, *, decide: bool) -> MCPServer:
    """The server, not started. decide: whether clients can answer approvals."""
    platform = Platform(by)
    server = MCPServer("holdfast", instructions=INSTRUCTIONS, log_level="WARNING")
    offered: list[tuple[Callable[..., Awaitable[Any]], ToolAnnotations]] = [
        (platform.start_run, STARTS),
        (platform.status, LOOKS),
        (platform.result, LOOKS),
        (platform.approvals, LOOKS),
    ]
    if decide:
        offered.append((platform.decide, DECIDES))
    for function, hints in offered:
        description = _about_agents() if function == platform.start_run else None
        server.add_tool(_in_words(function), description=description, annotations=hints)
    return server


def _about_agents() -> str:
    lines = ["Start an agent's run and return its id at once; the run goes on by itself.", "", "Agents:"]
    for spec in (*agents().values(), *batches().values()):
        fields = spec.input.model_json_schema()
        lines.append(f"- {spec.name}: {spec.description} Input schema: {_compact(fields)}")
    return "\n".join(lines)


def _compact(schema: Json) -> str:
    return json.dumps({name: part for name, part in schema.items() if name != "title"}, ensure_ascii=False)


def _in_words(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Returns errors that the caller can fix as messages, like the command line; bugs stay in the log."""

    @wraps(function)
    async def guarded(*args: Any, **kwargs: Any) -> Any:
        from holdfast.cli.errors import mendable

        try:
            return await function(*args, **kwargs)
        except Exception as error:
            if (message := mendable(error)) is not None:
                raise ToolError(message) from None
            raise

    return guarded


# ------------------------------------------------------------------ serving


async def serve(by: str, *, decide: bool, host: str, port: int | None) -> int:
    """Serves until the end of stdin, or over HTTP until a signal. Raises Refused for HTTP without a token."""
    with redirect_stdout(sys.stderr):  # this imports the agents, and an agent may print
        server = make_server(by, decide=decide)
    if port is None:
        await server.run_stdio_async()
        return 0
    import uvicorn

    token = settings().mcp_token.get_secret_value()
    if not token:
        raise Refused("--http needs HOLDFAST_MCP_TOKEN: its holders can start runs, so make it long and random")
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise Refused(f"cannot listen at {host}:{port}: {error.strerror}") from None
    app = _only_with(token, server.streamable_http_app(host=host))
    http = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    print(f"MCP server at http://{host}:{listening.getsockname()[1]}/mcp", file=sys.stderr, flush=True)
    await http.serve(sockets=[listening])
    return 0


def _only_with(token: str, app: Any) -> Any:
    """The app behind a bearer token; requests without it get 401."""
    wanted = f"Bearer {token}".encode()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(sent, wanted):
                from starlette.responses import JSONResponse

                refusal = JSONResponse({"error": "invalid_token"}, 401, {"WWW-Authenticate": "Bearer"})
                await refusal(scope, receive, send)
                return
        await app(scope, receive, send)

    return guarded
