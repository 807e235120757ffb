"""An MCP server that notes every call in a file, and misbehaves when asked to.

    python -m tests.integration.mcp.server JOURNAL [PORT]

Without a port it serves its stdin and stdout, else streamable HTTP on that port (0: any, written to JOURNAL.port).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn
from mcp import MCPError
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import BlobResourceContents, EmbeddedResource, ImageContent, TextContent, TextResourceContents
from starlette.requests import Request
from starlette.responses import Response


def make(journal: Path) -> MCPServer:
    server = MCPServer("notebook", log_level="ERROR")

    def note(tool: str, ctx: Context[Any, Any]) -> None:
        key = (ctx.request_context.meta or {}).get("holdfast/idempotency-key", "")
        with journal.open("a") as file:
            file.write(json.dumps({"tool": tool, "key": key, "pid": os.getpid()}) + "\n")

    @server.tool()
    async def look(ctx: Context[Any, Any], word: str, times: int = 1) -> str:
        """Look a word up."""
        note("look", ctx)
        return " ".join([word] * times)

    @server.tool()
    async def write(ctx: Context[Any, Any], text: str) -> dict[str, Any]:
        """Write a line down."""
        note("write", ctx)
        return {"written": text}

    @server.tool()
    async def slow(ctx: Context[Any, Any], seconds: float) -> str:
        """Take so long."""
        note("slow", ctx)
        await asyncio.sleep(seconds)
        return "done"

    @server.tool()
    async def block(ctx: Context[Any, Any], seconds: float = 3600) -> str:
        """Stop the whole server."""
        note("block", ctx)
        await asyncio.to_thread(os.kill, os.getpid(), signal.SIGSTOP)
        return "woken"

    @server.tool()
    async def die(ctx: Context[Any, Any]) -> str:
        """Take the server down."""
        note("die", ctx)
        os.kill(os.getpid(), signal.SIGKILL)
        return "never"

    @server.tool()
    async def complain(ctx: Context[Any, Any], text: str) -> str:
        """Fail with these words."""
        note("complain", ctx)
        raise ToolError(text)

    @server.tool()
    async def protest(ctx: Context[Any, Any], code: int) -> str:
        """Answer with an error of the protocol."""
        note("protest", ctx)
        raise MCPError(code, "the server protests")

    @server.tool(structured_output=False)
    async def show(ctx: Context[Any, Any]) -> list[Any]:
        """Show everything that is not text."""
        note("show", ctx)
        return [
            TextContent(type="text", text="look:"),
            ImageContent(type="image", data="aGVsbG8=", mime_type="image/png"),
            EmbeddedResource(
                type="resource", resource=TextResourceContents(uri="note://1", text="a note", mime_type="text/plain")
            ),
            EmbeddedResource(
                type="resource", resource=BlobResourceContents(uri="note://2", blob="aGk=", mime_type="audio/wav")
            ),
        ]

    @server.tool(structured_output=False)
    async def lie(ctx: Context[Any, Any]) -> str:
        """Answer otherwise than the schema says."""
        note("lie", ctx)
        return "no structure"

    promised = server._tool_manager.get_tool("lie")  # pyright: ignore[reportPrivateUsage]
    assert promised is not None
    promised.fn_metadata.output_schema = {"type": "object", "required": ["x"]}

    @server.tool()
    async def environment(name: str) -> str:
        """What the process has in its environment."""
        return os.environ.get(name, "not there")

    @server.tool()
    async def reword(ctx: Context[Any, Any], tool: str, description: str) -> str:
        """Change the description of a tool; without one, take the tool away."""
        function = {"look": look, "write": write}[tool]
        server.remove_tool(tool)
        if description:
            server.add_tool(function, name=tool, description=description)
        await ctx.notify_tools_changed()
        await ctx.session.send_tool_list_changed()
        return "changed"

    return server


async def serve_http(server: MCPServer, journal: Path, port: int) -> None:
    """After a POST to `/status/N` the next call of a tool is answered N."""
    forced: list[int] = []

    @server.custom_route("/status/{status:int}", methods=["POST"])
    async def force(request: Request) -> Response:
        forced.append(request.path_params["status"])
        return Response(status_code=204)

    app = server.streamable_http_app()

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        if forced and scope["type"] == "http" and (b"mcp-method", b"tools/call") in scope["headers"]:
            status = forced.pop()
            headers = {"retry-after": "7"} if status == 429 else {}
            await Response("no", status_code=status, headers=headers)(scope, receive, send)
            return
        if scope["type"] == "http" and (want := os.environ.get("NOTEBOOK_TOKEN")):
            sent = dict(scope["headers"]).get(b"authorization", b"").decode()
            if scope["path"] == "/mcp" and sent != f"Bearer {want}":
                await Response(f"no such token: {sent}", status_code=401)(scope, receive, send)
                return
        await app(scope, receive, send)

    config = uvicorn.Config(outer, port=port, log_level="error", timeout_graceful_shutdown=1, lifespan="on")
    http = uvicorn.Server(config)
    serving = asyncio.create_task(http.serve())
    while not http.started:
        await asyncio.sleep(0.01)
    journal.with_suffix(".port").write_text(str(http.servers[0].sockets[0].getsockname()[1]))
    await serving


def main() -> None:
    journal = Path(sys.argv[1])
    server = make(journal)
    if len(sys.argv) > 2:
        asyncio.run(serve_http(server, journal, int(sys.argv[2])))
        return
    if os.environ.get("NOTEBOOK_DEAF"):  # goes on after the end of its input, as a server should not
        threading.Thread(target=threading.Event().wait, daemon=False).start()
    server.run("stdio")


if __name__ == "__main__":
    main()
