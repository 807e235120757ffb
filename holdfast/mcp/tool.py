"""A tool of an MCP server, as the platform calls any tool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from holdfast.contracts import Json
from holdfast.mcp.spec import UNSEEN, McpServer
from holdfast.tools import Tool, ToolContext

if TYPE_CHECKING:
    from holdfast.mcp.listing import Listed


class Anything(BaseModel):
    """Arguments whose schema is the server's."""

    model_config = ConfigDict(extra="allow")


@dataclass
class RemoteTool(Tool):
    """`listed` is None for one that is known by its name only: then its arguments are checked when it is called."""

    server: McpServer | None = None
    listed: Listed | None = None

    def validate(self, arguments: Any) -> Json:
        if self.listed is None:
            return Anything.model_validate(arguments).model_dump()
        return self.listed.validate(arguments)

    async def call(self, ctx: ToolContext, arguments: Json) -> Any:
        assert self.server is not None and ctx.mcp is not None
        # Half of its time for a server that has to be started first: what then has not gone out is certain not to have.
        connection = ctx.mcp.connection(self.server)
        return await connection.call(self.name, self.version, arguments, ctx.key, connect_s=self.timeout_s / 2)

    @property
    def schema(self) -> Json:
        return self.listed.schema if self.listed else {"type": "object", "properties": {}}


def remote_tool(server: McpServer, name: str, version: str = UNSEEN, listed: Listed | None = None) -> RemoteTool:
    """The tool by the name that the model uses; `version` is the one that a decision was made for."""
    rule = server.rule(name)
    return RemoteTool(
        name=name,
        description=listed.description if listed else "",
        version=listed.version if listed else version,
        effect=rule.effect,
        service=server.name,
        timeout_s=rule.timeout,
        deadline_s=3600.0,
        retries=rule.retries,
        approval=rule.approval,
        role=rule.role,
        function=_no_function,
        arguments=Anything,
        result_schema=listed.result_schema if listed else {},
        server=server,
        listed=listed,
    )


def remote_tools(server: McpServer, listing: Mapping[str, Listed]) -> tuple[RemoteTool, ...]:
    """The tools of a listing that the agent has."""
    named = ((name, listed) for name, listed in listing.items() if server.may_have(name))
    return tuple(remote_tool(server, name, listed=listed) for name, listed in named)


def _no_function(*_: Any) -> None:
    raise AssertionError("a remote tool has no function of its own")
