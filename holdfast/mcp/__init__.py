"""Tools of MCP servers for our agents. The platform as a server is a command: `holdfast.cli.mcp_server`."""
