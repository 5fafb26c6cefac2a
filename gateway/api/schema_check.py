"""Reads a JSON schema for what the grammar library would ignore, expand without bound, or promise and not keep.

The library refuses what it knows and cannot do. Here are refused, by name and place: keywords it passes over, sizes
out of proportion, and schemas that no finite value satisfies, which would run every answer into its length limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MAX_SUBSCHEMAS = 5000
MAX_DEPTH = 64
MAX_COUNT = 10_000  # of minItems, minLength and the like
MAX_OPTIONAL = 2400  # properties at one place; a matcher follows all that may come next (see fleet.grammar.limits)

_MAX_ROUNDS = 100

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_ENFORCED = frozenset(
    {
        *(*_MAPS, *_LISTS, *_SINGLE, *_COUNTS),
        *("type", "enum", "const", "required", "pattern", "format", "$ref"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)
# What only describes. `discriminator` is OpenAPI's hint beside a `oneOf` that is enforced itself.
_ANNOTATIONS = frozenset(
    {
        *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "example", "examples"),
        *("deprecated", "readOnly", "writeOnly", "discriminator"),
    }
)
_LIBRARY_OPTIONS = "x-guidance"


class SchemaProblem(ValueError):
    """The schema cannot be served; the message says why and where."""


def check_schema(schema: object) -> None:
    """Raises: SchemaProblem."""
    nodes: dict[str, Any] = {}
    stack: list[tuple[str, Any, int]] = [("#", schema, 0)]
    while stack:
        place, node, depth = stack.pop()
        if isinstance(node, bool):
            nodes[place] = node
            continue
        if not isinstance(node, dict):
            raise SchemaProblem(f"{place} is not a schema: an object or a boolean is expected")
        if depth > MAX_DEPTH:
            raise SchemaProblem(f"it is nested deeper than {MAX_DEPTH} levels")
        nodes[place] = node
        if len(nodes) > MAX_SUBSCHEMAS:
            raise SchemaProblem(f"it has more than {MAX_SUBSCHEMAS} subschemas")
        _check_keywords(place, node)
        stack.extend((f"{place}/{step}", child, depth + 1) for step, child in _children(place, node))
    _check_optional(nodes)
    _check_finite(nodes)


def _children(place: str, node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Subschemas with their JSON pointers from here."""
    for keyword in _MAPS:
        if keyword in node:
            if not isinstance(node[keyword], dict):
                raise SchemaProblem(f"{place}/{keyword} must be an object")
            for name, child in node[keyword].items():
                yield f"{keyword}/{_escape(name)}", child
    for keyword in (*_LISTS, "items"):
        if isinstance(node.get(keyword), list):
            for index, child in enumerate(node[keyword]):
                yield f"{keyword}/{index}", child
        elif keyword in node and keyword in _LISTS:
            raise SchemaProblem(f"{place}/{keyword} must be a list of schemas")
    for keyword in _SINGLE:
        if keyword in node and not isinstance(node[keyword], list):
            yield keyword, node[keyword]


def _check_keywords(place: str, node: dict[str, Any]) -> None:
    for keyword in node:
        known = keyword in _ENFORCED or keyword in _ANNOTATIONS
        if not known and (not keyword.startswith("x-") or keyword == _LIBRARY_OPTIONS):
            raise SchemaProblem(f"the keyword {keyword[:80]!r} (in {place}) is not supported")
    for keyword in _COUNTS:
        count = node.get(keyword, 0)
        if keyword.startswith("min") and isinstance(count, int | float) and count > MAX_COUNT:
            raise SchemaProblem(f"{place}/{keyword} is {count}; at most {MAX_COUNT} is supported")
    # Free property names may repeat in an answer, and then count once.
    required = _required(node)
    minimum = node.get("minProperties", 0)
    if isinstance(minimum, int | float) and minimum > len(required) + 1:
        raise SchemaProblem(
            f"{place}/minProperties is {minimum}: at most one property beyond the {len(required)} required ones can be "
            "demanded; list them in 'required'"
        )


def _check_optional(nodes: dict[str, Any]) -> None:
    """Raises: SchemaProblem if too many optional properties could come next, those of all alternatives together."""
    optional = {place: _optional(node) for place, node in nodes.items()}
    if sum(optional.values()) <= MAX_OPTIONAL:
        return
    beside = {place: [step for step in _beside(place, node) if step in nodes] for place, node in nodes.items()}
    inner = {step for steps in beside.values() for step in steps}
    for place in (each for each in nodes if each == "#" or each not in inner):
        together, stack = {place}, [place]
        while stack:
            new = [step for step in beside[stack.pop()] if step not in together]
            together.update(new)
            stack.extend(new)
        if sum(optional[step] for step in together) > MAX_OPTIONAL:
            raise SchemaProblem(
                f"{place} has more than {MAX_OPTIONAL} optional properties, with all its alternatives; list them in "
                "'required'"
            )


def _optional(node: Any) -> int:
    properties = node.get("properties") if isinstance(node, dict) else None
    if not isinstance(properties, dict):
        return 0
    return len(properties.keys() - _required(node))


def _required(node: dict[str, Any]) -> set[str]:
    return set(node["required"]) if _is_strings(node.get("required")) else set()


def _beside(place: str, node: Any) -> Iterator[str]:
    """The schemas that the same value is matched with, for all that has been read of it."""
    if not isinstance(node, dict):
        return
    for keyword in ("anyOf", "oneOf", "allOf"):
        yield from (f"{place}/{keyword}/{index}" for index in range(len(node.get(keyword, ()))))
    if isinstance(node.get("$ref"), str):
        yield _target(node["$ref"])


def _check_finite(nodes: dict[str, Any]) -> None:
    """Raises: SchemaProblem if a schema can only be met by a value without end, such as a list that must hold itself.

    A least fixed point: a subschema ends if what it demands is known to end, until nothing new is learnt.
    """
    ending: set[str] = set()
    unknown = list(reversed(nodes))  # children first, so that a round learns most of what there is
    for _ in range(_MAX_ROUNDS):
        before = len(unknown)
        for place in unknown:
            if _ends(place, nodes[place], nodes, ending):
                ending.add(place)
        unknown = [place for place in unknown if place not in ending]
        if len(unknown) == before:
            break
    else:
        raise SchemaProblem(f"its references are chained through more than {_MAX_ROUNDS} definitions")
    if "#" not in ending:
        endless = min((place for place in nodes if place not in ending), key=lambda place: (-place.count("/"), place))
        raise SchemaProblem(f"no finite value satisfies it: {endless} demands itself")


def _ends(place: str, node: Any, nodes: dict[str, Any], ending: set[str]) -> bool:
    if isinstance(node, bool):
        return True
    reference = node.get("$ref")
    if isinstance(reference, str) and _target(reference) in nodes and _target(reference) not in ending:
        return False
    if _any_of_fails(place, node, ending):
        return False
    demanded = [f"{place}/allOf/{index}" for index in range(len(node.get("allOf", ())))]
    kind = node.get("type")
    if kind == "object" and _is_strings(node.get("required")):
        demanded += [f"{place}/properties/{_escape(name)}" for name in node["required"]]
    if kind == "array" and isinstance(node.get("minItems"), int):
        prefix = node.get("prefixItems", ())
        demanded += [f"{place}/prefixItems/{index}" for index in range(min(len(prefix), node["minItems"]))]
        demanded += [f"{place}/items"] if node["minItems"] > len(prefix) else []
    return all(step in ending for step in demanded if step in nodes)


def _any_of_fails(place: str, node: dict[str, Any], ending: set[str]) -> bool:
    return any(
        node.get(keyword) and not any(f"{place}/{keyword}/{index}" in ending for index in range(len(node[keyword])))
        for keyword in ("anyOf", "oneOf")
    )


def _target(reference: str) -> str:
    """The place that a local reference names; names of definitions are seldom escaped, and then both forms meet."""
    return reference.rstrip("/") or "#"


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
