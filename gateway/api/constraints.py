"""From what a request says about its answer's form to a grammar that is known to compile.

`constraint` reads the fields of a chat or text completion; `format_grammar` one format (`response_format`, or the
Responses API's `text.format`); `schema_grammar` a bare JSON schema, such as a tool's parameters; `checked` any other
grammar, such as Lark around `fleet.grammar.inline_schema`.
All raise InvalidRequest with the reason and the field, after at most some tenths of a second off the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from fleet import grammar as meaning
from fleet.types import Grammar, GrammarKind
from gateway.api.formats import (
    Choices,
    FlatJsonSchemaFormat,
    GrammarText,
    JsonInput,
    JsonObjectFormat,
    JsonSchemaFormat,
    OutputFormat,
    Pattern,
    ResponseFormat,
    StructuredOutputs,
    TextFormat,
)
from gateway.api.schema_check import SchemaProblem, check_schema
from gateway.errors import InvalidRequest

MAX_SCHEMA_CHARS = 262_144
MAX_GBNF_CHARS = 16_384
MAX_GBNF_LINES = 400
INLINE_CHARS = 2048  # what is shorter is checked at once: below a millisecond

ANY_OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')


class ConstraintFields(Protocol):
    """The fields of a request that may hold a constraint; at most one of them may."""

    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: JsonInput | None
    guided_regex: Pattern | None
    guided_choice: Choices | None
    guided_grammar: GrammarText | None


async def constraint(fields: ConstraintFields) -> Grammar | None:
    """The grammar of a request, None where any text will do. Raises: InvalidRequest, also if there is more than one."""
    asked = [item for item in _asked(fields) if item[1] is not None]
    if len(asked) > 1:
        first, second = asked[0][0], asked[1][0]
        raise _bad(f"{first!r} and {second!r} exclude each other: give one form of the answer.", second)
    for param, value in asked:
        match param.rpartition(".")[2].removeprefix("guided_"):
            case "response_format":
                return await format_grammar(fields.response_format, param=param)
            case "json":
                return await schema_grammar(_schema(value, param), param=param)
            case "regex":
                return await checked(Grammar(GrammarKind.REGEX, value), param=param)
            case "choice":
                return await checked(_choice(value), param=param)
            case "grammar":
                return await checked(await asyncio.to_thread(_lark, value, param), param=param)
            case "json_object":
                return ANY_OBJECT
    return None


async def format_grammar(chosen: ResponseFormat | OutputFormat | None, *, param: str) -> Grammar | None:
    """The grammar of one format; None for text. `param` is the field that holds it."""
    match chosen:
        case None | TextFormat():
            return None
        case JsonObjectFormat():
            return ANY_OBJECT
        case JsonSchemaFormat(json_schema=named):
            return await schema_grammar(named.schema or {}, param=f"{param}.json_schema.schema")
        case FlatJsonSchemaFormat(schema=schema):
            return await schema_grammar(schema, param=f"{param}.schema")


async def schema_grammar(schema: Mapping[str, Any], *, param: str) -> Grammar:
    """A grammar whose matches are the JSON texts that satisfy `schema`."""
    num_chars = len(msgspec.json.encode(schema))
    if num_chars > MAX_SCHEMA_CHARS:
        raise _bad(f"The schema has {num_chars} characters; at most {MAX_SCHEMA_CHARS} are supported.", param)
    try:
        if num_chars <= INLINE_CHARS:
            check_schema(schema)
        else:
            await asyncio.to_thread(check_schema, schema)
    except SchemaProblem as error:
        raise _bad(f"The JSON schema cannot be served: {error}.", param) from error
    return await checked(Grammar(GrammarKind.JSON_SCHEMA, meaning.schema_source(schema)), param=param)


async def checked(grammar: Grammar, *, param: str) -> Grammar:
    """The grammar itself once it is known to compile."""
    if len(grammar.source) <= INLINE_CHARS:
        problem = meaning.problem(grammar)
    else:
        problem = await asyncio.to_thread(meaning.problem, grammar)
    if problem is not None:
        kind = {GrammarKind.JSON_SCHEMA: "JSON schema", GrammarKind.REGEX: "regular expression"}
        raise _bad(f"The {kind.get(grammar.kind, 'grammar')} cannot be served: {problem}", param)
    return grammar


def _asked(fields: ConstraintFields) -> list[tuple[str, Any]]:
    """Every field that may hold a constraint, with None where it holds none."""
    chosen = None if isinstance(fields.response_format, TextFormat) else fields.response_format
    asked: list[tuple[str, Any]] = [("response_format", chosen)]
    asked += [
        (name, getattr(fields, name)) for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
    ]
    nested = fields.structured_outputs
    if nested is not None:
        asked += [
            (f"structured_outputs.{name}", getattr(nested, name) or None)
            if name == "json_object"
            else (f"structured_outputs.{name}", getattr(nested, name))
            for name in nested.__struct_fields__
        ]
    return asked


def _schema(value: JsonInput, param: str) -> dict[str, Any]:
    """A schema that may come as text. Raises: InvalidRequest."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise _bad(f"{param!r} is not a JSON object: {error}", param) from error


def _choice(choices: list[str]) -> Grammar:
    """One of the strings, as JSON spells them, which Lark reads alike."""
    return Grammar(GrammarKind.LARK, "start: " + " | ".join(msgspec.json.encode(choice).decode() for choice in choices))


def _lark(text: str, param: str) -> Grammar:
    """Lark as it is; GBNF, the EBNF dialect of llama.cpp and vLLM, translated. Raises: InvalidRequest.

    The translation takes time by the square of the lines, so there may not be many.
    """
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    lines = [line for line in text.split("\n") if line.strip()]
    text = "\n".join(lines)  # blank lines alone would cost both functions minutes
    if is_lark_syntax(text):
        return Grammar(GrammarKind.LARK, text)
    if len(lines) > MAX_GBNF_LINES or len(text) > MAX_GBNF_CHARS:
        message = f"GBNF is translated up to {MAX_GBNF_LINES} lines and {MAX_GBNF_CHARS} characters; use Lark for more."
        raise _bad(message, param)
    try:
        return Grammar(GrammarKind.LARK, gbnf_to_lark(text))
    except Exception as error:  # the translator raises bare Exception for a rule that is missing
        raise _bad(f"The grammar is neither Lark nor GBNF: {meaning.short(str(error))}", param) from error


def _bad(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
