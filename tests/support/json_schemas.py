"""JSON schemas in the style of public suites: a list by hand, and as many as one likes from a seeded generator.

Every one uses only what Baton says that it enforces (docs/api.md), so every finished answer must satisfy it.
"""

from __future__ import annotations

import json
import random
from decimal import Decimal, InvalidOperation, localcontext
from typing import Any

import jsonschema

Schema = dict[str, Any]

FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
PATTERNS = (
    "^[A-Z]{2,4}-[0-9]{3}$",
    "^(red|green|blue)$",
    "^[a-z]+(_[a-z]+){0,3}$",
    "^\\d{4}-\\d{2}$",
    "^#[0-9a-f]{6}$",
    "ab?c",
    "^.{3,9}$",
    "^\\+?[1-9][0-9]{4,10}$",
    '^[^"\\\\]{1,5}!$',
)


def objects(**properties: Any) -> Schema:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


STRING: Schema = {"type": "string"}
WORD: Schema = {"type": "string", "pattern": "^[a-z]{1,12}$"}
INTEGER: Schema = {"type": "integer"}

BY_HAND: tuple[Schema, ...] = (
    {"type": "object"},
    {"type": "array"},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["string", "null"]},
    {"type": ["integer", "boolean"], "minimum": 3},
    {"const": "fixed"},
    {"const": {"a": [1, "two", None, 2.5]}},
    {"const": 'quote " slash \\ newline \n é 😀'},
    {"enum": ["a", 1, None, True, {"x": 1}, [1, 2]]},
    {"enum": ["é", "日本語", "line\nbreak", "tab\t"]},
    {"type": "string", "enum": ["one", "two", "three"]},
    *({"type": "string", "format": name} for name in FORMATS),
    *({"type": "string", "pattern": pattern} for pattern in PATTERNS),
    {"type": "string", "minLength": 3, "maxLength": 8},
    {"type": "string", "maxLength": 0},
    {"type": "string", "minLength": 5, "maxLength": 5},
    {"type": "string", "pattern": "^[a-z]*$", "minLength": 4, "maxLength": 9},
    {"type": "integer", "minimum": 0, "maximum": 255},
    {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3},
    {"type": "integer", "minimum": -1000, "maximum": -990},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0.5, "exclusiveMaximum": 0.75},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 100},
    {"type": "number", "minimum": -273.15},
    {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 5},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 0},
    {"type": "array", "items": WORD, "minItems": 3, "maxItems": 3},
    {"type": "array", "prefixItems": [INTEGER, WORD, {"type": "boolean"}], "items": False, "minItems": 3},
    {"type": "array", "prefixItems": [WORD], "items": INTEGER, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"type": "array", "items": INTEGER, "maxItems": 2}, "minItems": 1, "maxItems": 3},
    objects(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 130}),
    objects(a=objects(b=objects(c=objects(d={"const": 1})))),
    {"type": "object", "properties": {"a": INTEGER, "b": WORD}, "additionalProperties": False},
    {"type": "object", "properties": {"a": INTEGER, "b": WORD}, "required": ["b"], "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9}, "maxProperties": 3},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^x_": {"type": "boolean"}}, "additionalProperties": False},
    {"type": "object", "properties": {"id": INTEGER}, "required": ["id", "free"], "additionalProperties": WORD},
    {"type": "object", "properties": {"": INTEGER, "a b": WORD, 'q"': WORD}, "required": ["", "a b", 'q"']},
    {"anyOf": [INTEGER, WORD, {"type": "null"}]},
    {"anyOf": [objects(kind={"const": "a"}, x=INTEGER), objects(kind={"const": "b"}, y=WORD)]},
    {"oneOf": [objects(kind={"const": "cat"}, n=INTEGER), objects(kind={"const": "dog"}, ok={"type": "boolean"})]},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 5}]},
    {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 20}]},
    {"allOf": [objects(a=INTEGER) | {"additionalProperties": True}, {"properties": {"b": WORD}, "required": ["b"]}],
     "maxProperties": 2},
    {"$defs": {"at": objects(x=INTEGER, y=INTEGER)}, **objects(a={"$ref": "#/$defs/at"}, b={"$ref": "#/$defs/at"})},
    {"definitions": {"w": WORD}, "type": "array", "items": {"$ref": "#/definitions/w"}, "minItems": 1, "maxItems": 4},
    {
        "$defs": {"tree": objects(v={"type": "integer", "minimum": 0, "maximum": 9}, kids={
            "type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1})},
        "$ref": "#/$defs/tree",
    },
    {
        "$defs": {"node": {"anyOf": [{"type": "null"}, objects(value=WORD, next={"$ref": "#/$defs/node"})]}},
        "$ref": "#/$defs/node",
    },
    {
        "$defs": {
            "even": {"anyOf": [{"type": "null"}, objects(odd={"$ref": "#/$defs/odd"})]},
            "odd": objects(even={"$ref": "#/$defs/even"}),
        },
        "$ref": "#/$defs/odd",
    },
    {
        "title": "Invoice", "description": "As a client would send it.", "$schema": "https://json-schema.org/draft/2020-12/schema",
        **objects(
            id={"type": "string", "format": "uuid"},
            issued={"type": "string", "format": "date", "examples": ["2024-01-31"]},
            customer=objects(name=WORD, email={"type": "string", "format": "email"}),
            lines={"type": "array", "minItems": 1, "maxItems": 2, "items": objects(
                sku={"type": "string", "pattern": "^[A-Z]{3}[0-9]{2}$"},
                count={"type": "integer", "minimum": 1, "maximum": 99, "default": 1},
                price={"type": "number", "minimum": 0, "maximum": 1000, "multipleOf": 0.01})},
            currency={"enum": ["EUR", "USD"]},
            paid={"type": ["boolean", "null"]},
        ),
    },
)  # fmt: skip


def generated(count: int, *, seed: int = 20261124) -> list[Schema]:
    """As many schemas, the same for the same seed."""
    rng = random.Random(seed)
    return [_definitions(rng) if rng.random() < 0.15 else _schema(rng, 3) for _ in range(count)]


def validator(schema: Schema) -> jsonschema.Draft202012Validator:
    """With formats, and with decimal arithmetic: `0.3` is a multiple of `0.1`."""
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    return jsonschema.Draft202012Validator(exact, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


def check(schema: Schema, text: str) -> None:
    """Raises: a decoding or validation error if `text` is not JSON that satisfies the schema."""
    with localcontext() as context:
        context.prec = 1000  # digits; a number may have as many as an answer has tokens
        validator(schema).validate(json.loads(text, parse_float=_number_of))


def _number_of(text: str) -> Decimal | float:
    """Exact, but for exponents beyond those of `Decimal`, which are JSON too."""
    try:
        return Decimal(text)
    except InvalidOperation:
        return float(text)


def _schema(rng: random.Random, depth: int) -> Schema:
    leaves = (_string, _integer, _number, _constant, _simple)
    branches = (_object, _object, _array, _any_of, _all_of)
    return rng.choice(branches if depth and rng.random() < 0.7 else leaves)(rng, depth)


def _string(rng: random.Random, depth: int) -> Schema:
    del depth
    made: Schema = {"type": "string"}
    match rng.randrange(4):
        case 0:
            made["format"] = rng.choice(FORMATS)
        case 1:
            made["pattern"] = rng.choice(PATTERNS)
        case 2:
            low = rng.randrange(6)
            made |= {"minLength": low, "maxLength": low + rng.randrange(20)}
        case _:
            made["maxLength"] = rng.randrange(1, 24)
    return made


def _integer(rng: random.Random, depth: int) -> Schema:
    del depth
    low = rng.randrange(-1000, 1000)
    made: Schema = {"type": "integer"}
    if rng.random() < 0.6:
        made[rng.choice(("minimum", "exclusiveMinimum"))] = low
    if rng.random() < 0.6:
        made[rng.choice(("maximum", "exclusiveMaximum"))] = low + rng.randrange(40, 500)
    if rng.random() < 0.3:
        made["multipleOf"] = rng.choice((2, 3, 5, 10, 12))
    return made


def _number(rng: random.Random, depth: int) -> Schema:
    del depth
    low = rng.randrange(-100, 100) / 4
    made: Schema = {"type": "number"}
    if rng.random() < 0.6:
        made[rng.choice(("minimum", "exclusiveMinimum"))] = low
    if rng.random() < 0.6:
        made[rng.choice(("maximum", "exclusiveMaximum"))] = low + rng.randrange(2, 500) / 8
    if rng.random() < 0.2:
        made["multipleOf"] = rng.choice((0.5, 0.25, 0.01, 2))
    return made


def _constant(rng: random.Random, depth: int) -> Schema:
    del depth
    values: list[Any] = ["alpha", "βeta", 'a"b', "", 0, -1, 2.5, None, True, [], [1, "x"], {"k": {"n": 1}}]
    if rng.random() < 0.4:
        return {"const": rng.choice(values)}
    return {"enum": rng.sample(values, rng.randrange(1, 6))}


def _simple(rng: random.Random, depth: int) -> Schema:
    del depth
    names = ["boolean", "null", "integer"]
    return {"type": rng.choice(names) if rng.random() < 0.7 else sorted(rng.sample(names, 2))}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["id", "name", "tags", "größe", "a b", "x-y", "value", "next", "n1"], rng.randrange(1, 5))
    made: Schema = {"type": "object", "properties": {name: _schema(rng, depth - 1) for name in names}}
    made["required"] = sorted(rng.sample(names, rng.randrange(len(names) + 1)))
    kind = rng.randrange(4)
    if kind:
        made["additionalProperties"] = False
    else:
        made["required"] = sorted(names)
        made["additionalProperties"] = _schema(rng, 0)
        made["maxProperties"] = len(names) + rng.randrange(3)
    return made


def _array(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(3)
    made: Schema = {"type": "array", "minItems": low, "maxItems": low + rng.randrange(3)}
    if rng.random() < 0.25:
        made["prefixItems"] = [_schema(rng, depth - 1) for _ in range(rng.randrange(1, 3))]
    made["items"] = _schema(rng, depth - 1)
    return made


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randrange(2, 4))]}


def _all_of(rng: random.Random, depth: int) -> Schema:
    del depth
    low = rng.randrange(50)
    return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + rng.randrange(1, 90)}]}


def _definitions(rng: random.Random) -> Schema:
    """Definitions used twice, one of them recursive."""
    leaf = _schema(rng, 1)
    chain = {"anyOf": [{"type": "null"}, objects(item={"$ref": "#/$defs/leaf"}, rest={"$ref": "#/$defs/chain"})]}
    return {
        "$defs": {"leaf": leaf, "chain": chain},
        **objects(first={"$ref": "#/$defs/leaf"}, more={"$ref": "#/$defs/chain"}),
    }
