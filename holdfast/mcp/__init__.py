"""MCP both ways: tools of other servers for our agents (`spec`, `hub`), and the platform as a server (`platform`)."""
