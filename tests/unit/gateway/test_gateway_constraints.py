"""From a request's words about the form of its answer to a grammar, or a 400 that says why not."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from fleet.types import Grammar, GrammarKind
from gateway.api.constraints import ANY_OBJECT, constraint, format_grammar, schema_grammar
from gateway.api.formats import OutputFormat
from gateway.api.requests import CompletionRequest
from gateway.errors import InvalidRequest

PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def fields(**chosen: Any) -> CompletionRequest:
    return msgspec.convert({"model": "m", "prompt": "p", **chosen}, CompletionRequest)


def named(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


async def refusal(schema: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await schema_grammar(schema, param="here")
    assert caught.value.param == "here"
    return caught.value.message


async def test_every_form_becomes_a_grammar() -> None:
    assert await constraint(fields()) is None
    assert await constraint(fields(response_format={"type": "text"}, guided_regex=None)) is None
    assert await constraint(fields(response_format={"type": "json_object"})) == ANY_OBJECT
    assert await constraint(fields(structured_outputs={"json_object": True})) == ANY_OBJECT
    assert await constraint(fields(structured_outputs={"json_object": False})) is None
    asked = (
        fields(response_format=named(PERSON, strict=True)),
        fields(response_format=named(PERSON, strict=False)),
        fields(guided_json=PERSON),
        fields(guided_json=msgspec.json.encode(PERSON).decode()),
        fields(structured_outputs={"json": PERSON}),
    )
    grammars = {await constraint(one) for one in asked}
    assert grammars == {Grammar(GrammarKind.JSON_SCHEMA, msgspec.json.encode(PERSON).decode())}
    flat = msgspec.convert({"type": "json_schema", "name": "n", "schema": PERSON}, OutputFormat)
    assert {await format_grammar(flat, param="text.format")} == grammars
    regex = await constraint(fields(guided_regex=r"\d{3}"))
    assert (
        regex
        == await constraint(fields(structured_outputs={"regex": r"\d{3}"}))
        == Grammar(GrammarKind.REGEX, r"\d{3}")
    )
    choice = await constraint(fields(guided_choice=["a", 'quote " and \n', "é"]))
    assert choice is not None
    assert choice.source == 'start: "a" | "quote \\" and \\n" | "é"'
    gbnf = await constraint(fields(guided_grammar='root ::= "a" rest\nrest ::= [0-9]+'))
    assert gbnf is not None
    assert gbnf.kind is GrammarKind.LARK
    assert "start:" in gbnf.source


@pytest.mark.parametrize(
    ("chosen", "param"),
    [
        ({"response_format": named(PERSON), "guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": ["a"], "structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a", "grammar": 'start: "a"'}}, "structured_outputs.grammar"),
        ({"guided_regex": "(["}, "guided_regex"),
        ({"guided_regex": "(?=a)b"}, "guided_regex"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
        ({"guided_grammar": "::= ::="}, "guided_grammar"),
        ({"guided_grammar": "\n" * 100_000 + "root ::= nowhere"}, "guided_grammar"),
        ({"guided_grammar": "root ::= x\n" + 'x ::= "x"\n' * 1000}, "guided_grammar"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"response_format": named({"type": "foo"})}, "response_format.json_schema.schema"),
    ],
)
async def test_what_cannot_be_served_names_its_field(chosen: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await constraint(fields(**chosen))
    assert caught.value.param == param


@pytest.mark.parametrize(
    "keyword",
    [
        "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "contains", "minContains",
        "propertyNames", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "contentEncoding", "nullable",
        "minLenght", "x-guidance",
    ],
)  # fmt: skip
async def test_keywords_that_are_not_enforced_are_refused_by_name(keyword: str) -> None:
    message = await refusal({"type": "object", "properties": {"a": {keyword: {"type": "string"}}}})
    assert f"'{keyword}'" in message
    assert "#/properties/a" in message


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#/$defs/nowhere"}, "does not exist"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no finite value"),
        ({"type": "object", "properties": {"self": {"$ref": "#"}}, "required": ["self"]}, "no finite value"),
        ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "no finite value"),
        (
            {"anyOf": [{"$ref": "#"}, {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}]},
            "no finite value",
        ),
        ({"type": "string", "pattern": "(["}, "unclosed"),
        ({"type": "string", "pattern": "a(?!b)"}, "look"),
        ({"type": "string", "format": "color"}, "color"),
        ({"type": "foo"}, "foo"),
        ({"type": "object", "properties": 5}, "properties"),
        ({"properties": {"a": 5}}, "#/properties/a"),
        ({"anyOf": {}}, "#/anyOf"),
        ({"enum": []}, "nsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "array", "items": {}, "minItems": 10**9}, "minItems"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "object", "minProperties": 1, "properties": {"a": {}, "b": {}}}, "/maxProperties"),
    ],
)
async def test_schemas_that_cannot_be_met_are_refused(schema: Any, reason: str) -> None:
    assert reason in await refusal(schema)


async def test_sizes_are_bounded_in_time_too() -> None:
    deep: Any = {}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    many = {f"p{i}": {"type": "string"} for i in range(6000)}
    wide = {"type": "object", "properties": many, "required": list(many)}
    chain = {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)}, "$ref": "#/$defs/d0"}
    chain["$defs"]["d3000"] = {"type": "string"}  # type: ignore[index]
    shuffled = {"$ref": "#/$defs/d0", "$defs": dict(sorted(chain["$defs"].items(), key=lambda item: hash(item[0])))}  # type: ignore[attr-defined]
    doubled = {"$ref": "#/$defs/a0", "$defs": {"a40": {"type": "string"}}}
    for i in range(40):
        twice = [{"$ref": f"#/$defs/a{i + 1}"}] * 2
        doubled["$defs"][f"a{i}"] = {"allOf": twice}  # type: ignore[index]
    began_s = time.perf_counter()
    assert "nested deeper" in await refusal(deep)
    assert "subschemas" in await refusal(wide)
    assert "optional properties" in await refusal({"type": "object", "properties": {f"p{i}": {} for i in range(2401)}})
    two = [{"type": "object", "properties": {f"{name}{i}": {} for i in range(1300)}} for name in "pq"]
    assert "all its alternatives" in await refusal({"anyOf": two})
    assert "all its alternatives" in await refusal(
        {"$defs": dict(zip("pq", two, strict=True)), "oneOf": [{"$ref": "#/$defs/p"}, {"$ref": "#/$defs/q"}]}
    )
    assert "characters" in await refusal({"type": "string", "enum": ["x" * 300_000]})
    for schema in (chain, shuffled, doubled):
        try:
            await schema_grammar(schema, param="here")
        except InvalidRequest as error:
            assert error.message  # noqa: PT017 - either answer will do, an honest one in time
    assert time.perf_counter() - began_s < 20  # an exponential expansion would take years


async def test_many_properties_and_recursion_are_served() -> None:
    many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
    for schema in (many, {**many, "required": list(many["properties"])}):
        assert (await schema_grammar(schema, param="here")).kind is GrammarKind.JSON_SCHEMA
    tree = {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#"}}},
    }
    tree["required"] = ["v", "kids"]
    assert await schema_grammar(tree, param="here")
