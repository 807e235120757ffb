"""Tools of MCP servers for agents. `holdfast.cli.mcp_server` offers the platform itself as an MCP server."""
