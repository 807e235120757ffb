"""What a server says its tools take: used where it can be, left to the server where it cannot."""

import pytest
from pydantic import ValidationError

from holdfast.contracts.data import Json
from holdfast.ext.mcp.listing import Listed


def taking(x: Json, **more: Json) -> Listed:
    """A tool with an argument of this schema."""
    return Listed("tool", "", {"type": "object", "properties": {"x": x}, **more}, {})


@pytest.mark.parametrize(
    "x",
    [{"oneOf": [{"type": "integer"}, {"const": "a"}]}, {"$ref": "#/$defs/node"}],
    ids=["oneOf", "a $ref that calls itself"],
)
def test_arguments_are_held_against_the_schema(x: Json):
    node = {"type": ["object", "integer"], "properties": {"next": {"$ref": "#/$defs/node"}}}
    tool = taking(x, **{"$defs": {"node": node}})
    assert tool.problem == ""
    assert tool.validate({"x": 1}) == {"x": 1}
    with pytest.raises(ValidationError):
        tool.validate({"x": "b"})


@pytest.mark.parametrize(
    "x",
    [
        {"$ref": "https://schemas.example.com/x.json"},
        {"$ref": "#/$defs/nowhere"},
        {"type": "string", "pattern": r"^\p{L}+$"},
        {"$ref": "#/properties/x"},
    ],
    ids=["elsewhere", "nowhere", "another language's pattern", "itself"],
)
def test_what_cannot_be_checked_here_is_left_to_the_server(x: Json):
    tool = taking(x)
    assert tool.problem == ""
    assert tool.validate({"x": "b"}) == {"x": "b"}


def test_a_schema_that_is_none_is_said_to_be_a_problem():
    assert "objekt" in taking({"type": "objekt"}).problem
