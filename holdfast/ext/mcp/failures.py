"""Failures of MCP servers besides those that they report. `holdfast.reliability.errors` classifies them."""


class ServerDown(Exception):
    """There is no session with the server, so the call was certainly not sent."""


class BadAnswer(Exception):
    """The server's answer to a call does not fit the schema that it declared."""
