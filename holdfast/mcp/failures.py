"""What can go wrong with an MCP server besides what it says itself. `holdfast.reliability.errors` judges them."""


class ServerDown(Exception):
    """There is no session with the server, so the call certainly did not go out."""


class BadAnswer(Exception):
    """The server answered a call with something that does not fit what it promised."""
