"""Pure: no server, no process, no socket, no store."""
