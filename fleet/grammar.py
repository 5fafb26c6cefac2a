"""What a `fleet.types.Grammar` means, alike for the gateway that checks it and the workers that enforce it.

The language is llguidance's (https://github.com/guidance-ai/llguidance, `docs/`): JSON Schema draft 2020-12 where it is
supported and an error where it is not, Rust regular expressions that match the whole output, and context-free grammars
in a dialect of Lark, in which `%json {…}` stands for a value of a schema. Lookarounds and backreferences do not exist.

The library is imported by whoever calls a function here: a gateway without structured requests never loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from fleet.types import Grammar, GrammarKind

if TYPE_CHECKING:
    from llguidance import LLParserLimits

WHITESPACE = r"( |\n[ \t]{0,32})"
"""Allowed once wherever JSON allows whitespace: enough for every usual style, too little to go on without end."""

_NUM_CHECKED = 128
_NO_LEAP_SECOND = ":[0-5][0-9]:[0-5][0-9]"
_HOSTNAME_CHARS = 253
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties")
_MAX_PROBLEM_CHARS = 400


def schema_source(schema: Mapping[str, Any]) -> str:
    """The source of a grammar whose matches are the JSON texts that satisfy `schema`."""
    return msgspec.json.encode(_tightened(schema)).decode()


def inline_schema(schema: Mapping[str, Any]) -> str:
    """A JSON schema as a term inside a Lark grammar: `start: "<call>" ` + this + ` "</call>"`."""
    options = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    return "%json " + msgspec.json.encode({**_tightened(schema), **options}).decode()


def _tightened(schema: Any) -> Any:
    """A copy in which two formats mean what their standards say, where the library lets more through.

    Times have no second 60, which RFC 3339 has only where a leap second fell; host names are not too long (RFC 1123).
    """
    if not isinstance(schema, Mapping):
        return schema
    copy: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in _SCHEMA_MAPS and isinstance(value, Mapping):
            copy[keyword] = {name: _tightened(child) for name, child in value.items()}
        elif keyword in _SCHEMA_LISTS and isinstance(value, list):
            copy[keyword] = [_tightened(child) for child in value]
        else:
            copy[keyword] = _tightened(value) if keyword in _SCHEMAS else value
    timed = copy.get("format") in ("time", "date-time")
    if timed and copy.setdefault("pattern", _NO_LEAP_SECOND) != _NO_LEAP_SECOND:
        copy["allOf"] = [*copy.get("allOf", ()), {"pattern": _NO_LEAP_SECOND}]
    if copy.get("format") == "hostname" and isinstance(copy.setdefault("maxLength", _HOSTNAME_CHARS), int):
        copy["maxLength"] = min(copy["maxLength"], _HOSTNAME_CHARS)
    return copy


def library_source(grammar: Grammar) -> str:
    """The grammar in the library's own serialized form. Raises ValueError if a JSON schema is not JSON."""
    from llguidance import LLMatcher

    if grammar.kind is GrammarKind.JSON_SCHEMA:
        return LLMatcher.grammar_from_json_schema(
            grammar.source,
            overrides={"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False},
        )
    if grammar.kind is GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(grammar.source)
    return LLMatcher.grammar_from_lark(grammar.source)


def limits() -> LLParserLimits:
    """Bounds of one matcher: about 40 ms for one mask, and tens of MiB, before it gives up.

    The library's own bound of a row, 2,000 items, would end objects of 500 optional properties, at four items each.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, max_items_in_row=10_000, verbose_errors=False)


@lru_cache(maxsize=_NUM_CHECKED)
def problem(grammar: Grammar) -> str | None:
    """Why the grammar does not compile, in one sentence, or None. Blocking, up to tenths of a second for huge ones.

    What depends on the vocabulary (a Lark grammar that names a special token) is not found here.
    """
    from llguidance import LLMatcher

    try:
        source = library_source(grammar)
    except ValueError as error:
        return short(str(error))
    is_error, messages = LLMatcher.validate_grammar_with_warnings(source, limits=limits())
    return short(messages[0]) if is_error else None


def short(message: str) -> str:
    """A library's message, which may span lines and quote the whole grammar, as one line of bounded length."""
    return " ".join(message.split())[:_MAX_PROBLEM_CHARS]
