"""The fields by which clients say what an answer must look like: OpenAI's formats and vLLM's extensions."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

MAX_PATTERN_CHARS = 16_384
MAX_GRAMMAR_CHARS = 131_072
MAX_CHOICES = 10_000

FormatName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
Schema = dict[str, Any]


class _Format(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of formats: an unknown field is an error that names it."""


class TextFormat(_Format, tag="text", tag_field="type"):
    """Anything."""


class JsonObjectFormat(_Format, tag="json_object", tag_field="type"):
    """Any JSON object."""


class NamedSchema(_Format):
    """A schema with its name. It is enforced whatever `strict` says."""

    name: FormatName
    description: str | None = None
    schema: Schema | None = None
    strict: bool | None = None


class JsonSchemaFormat(_Format, tag="json_schema", tag_field="type"):
    """JSON that satisfies a schema, as chat completions write it."""

    json_schema: NamedSchema


class FlatJsonSchemaFormat(_Format, tag="json_schema", tag_field="type"):
    """The same as the Responses API writes it in `text.format`."""

    name: FormatName
    schema: Schema
    description: str | None = None
    strict: bool | None = None


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat
OutputFormat = TextFormat | JsonObjectFormat | FlatJsonSchemaFormat

JsonInput = str | Schema
Pattern = Annotated[str, Meta(max_length=MAX_PATTERN_CHARS)]
Choices = Annotated[list[str], Meta(min_length=1, max_length=MAX_CHOICES)]
GrammarText = Annotated[str, Meta(max_length=MAX_GRAMMAR_CHARS)]


class StructuredOutputs(_Format):
    """`structured_outputs`, as vLLM names it: exactly one of the five."""

    json: JsonInput | None = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None
