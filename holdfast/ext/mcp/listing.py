"""Listings of MCP servers' tools, and results of their calls: schemas, validation, results as text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import jsonschema
from jsonschema.validators import validator_for
from mcp import types
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable

from holdfast.contracts.data import Json, digest


@dataclass(frozen=True)
class Listed:
    """A tool as its server listed it."""

    remote: str
    """The server's own name for it."""
    description: str
    schema: Json = field(hash=False)
    result_schema: Json = field(hash=False)

    @cached_property
    def version(self) -> str:
        """Digest of the description and the schema. A call that was decided for another version is refused."""
        return digest([self.description, self.schema])[:8]

    @cached_property
    def _validator(self) -> Any:
        # With an empty registry a `$ref` resolves within the schema only, so nothing is fetched from the network.
        return validator_for(self.schema)(self.schema, registry=Registry())

    @property
    def problem(self) -> str:
        """Why the schema cannot be used; empty when it can."""
        kind: Any = validator_for(self.schema)
        try:
            # Without formats: a regular expression of another language may be correct and yet invalid in Python.
            kind.check_schema(self.schema, format_checker=jsonschema.FormatChecker(formats=()))
        except jsonschema.SchemaError as error:
            return error.message
        return ""

    def validate(self, arguments: Any) -> Json:
        """Returns the arguments unchanged. Raises pydantic's ValidationError, as every tool does.

        When a schema cannot be evaluated here (an external `$ref`, a pattern that Python does not support), only the
        server checks the arguments.
        """
        try:
            found = list(islice(self._validator.iter_errors(arguments), 5))
        except (Unresolvable, re.error, RecursionError):
            return arguments
        if not found:
            return arguments
        raise ValidationError.from_exception_data(self.remote, [_as_ours(each) for each in found])


def _as_ours(error: jsonschema.ValidationError) -> InitErrorDetails:
    # A template, because pydantic would interpret braces in the message itself.
    kind = PydanticCustomError("json_schema", "{words}", {"words": error.message})
    return InitErrorDetails(type=kind, loc=tuple(error.absolute_path), input=None)


def listed(tool: types.Tool) -> Listed:
    description = tool.description or tool.title or tool.name
    return Listed(tool.name, description, tool.input_schema, tool.output_schema or {})


def content(result: types.CallToolResult) -> Any:
    """Returns a result as JSON data: the structured content if there is any, else text that also describes images and
    the like."""
    words = [_words(block) for block in result.content]
    if result.structured_content is None or result.is_error:
        return "\n".join(words)
    # The text blocks repeat the structured content for clients that do not support it.
    more = [text for block, text in zip(result.content, words, strict=True) if not isinstance(block, types.TextContent)]
    return {"result": result.structured_content, "more": more} if more else result.structured_content


def _words(block: types.ContentBlock) -> str:
    match block:
        case types.TextContent():
            return block.text
        case types.ImageContent() | types.AudioContent():
            return f"[{block.type}, {block.mime_type}, {_size(block.data)}: cannot be shown]"
        case types.ResourceLink():
            return f"[resource {block.uri}: {block.description or block.name}]"
        case types.EmbeddedResource():
            inner = block.resource
            if isinstance(inner, types.TextResourceContents):
                return f"[resource {inner.uri}]\n{inner.text}"
            return f"[resource {inner.uri}, {inner.mime_type or 'binary'}, {_size(inner.blob)}: cannot be shown]"


def _size(base64: str) -> str:
    return f"{len(base64) * 3 // 4 - base64[-2:].count('=')} bytes"
