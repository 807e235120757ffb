"""One process of ours against real servers: Temporal, SQLite and Postgres, HTTP, MCP."""
