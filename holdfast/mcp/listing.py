"""What an MCP server says of its tools, and what they say: schemas, validation, results in words."""

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

from holdfast.contracts import Json, digest


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
        """Changes with what the model goes by: a decision made for another version is not carried out."""
        return digest([self.description, self.schema])[:8]

    @cached_property
    def _validator(self) -> Any:
        # With an empty registry a `$ref` resolves within the schema only: nothing is fetched from anywhere.
        return validator_for(self.schema)(self.schema, registry=Registry())

    @property
    def problem(self) -> str:
        """Why the schema cannot be used; empty when it can."""
        kind: Any = validator_for(self.schema)
        try:
            # Without formats: a pattern that another language's expressions know is none of Python's, but no mistake.
            kind.check_schema(self.schema, format_checker=jsonschema.FormatChecker(formats=()))
        except jsonschema.SchemaError as error:
            return error.message
        return ""

    def validate(self, arguments: Any) -> Json:
        """The arguments as they are. Raises pydantic's ValidationError, as every tool does.

        A schema that cannot be followed here (a `$ref` to elsewhere, a pattern that Python does not know) is left to
        its server, which checks the arguments itself.
        """
        try:
            found = list(islice(self._validator.iter_errors(arguments), 5))
        except (Unresolvable, re.error, RecursionError):
            return arguments
        if not found:
            return arguments
        raise ValidationError.from_exception_data(self.remote, [_as_ours(each) for each in found])


def _as_ours(error: jsonschema.ValidationError) -> InitErrorDetails:
    # The braces of a message would be taken for a template.
    kind = PydanticCustomError("json_schema", "{words}", {"words": error.message})
    return InitErrorDetails(type=kind, loc=tuple(error.absolute_path), input=None)


def listed(tool: types.Tool) -> Listed:
    description = tool.description or tool.title or tool.name
    return Listed(tool.name, description, tool.input_schema, tool.output_schema or {})


def content(result: types.CallToolResult) -> Any:
    """A result as JSON data: the structured one where there is one, else text; what is neither, described in words."""
    words = [_words(block) for block in result.content]
    if result.structured_content is None or result.is_error:
        return "\n".join(words)
    # Its text repeats it for clients that know no structure.
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
