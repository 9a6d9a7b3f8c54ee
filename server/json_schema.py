"""JSON schemas of clients, before a grammar is made of them: what would harm the server is refused, and objects are closed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from server.errors import InvalidRequest

LARGEST, SMALLEST = 2**53, 1e-6
"""Magnitudes of numbers. llguidance rounds larger ones, and ends the process at some; bounds that are smaller it takes for 0."""
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
MAX_PATTERNS = 12
"""That one text must fit at once: the time to find what fits them all doubles with each."""

SCHEMAS_BY_NAME = {"properties", "patternProperties"}
DEFINITIONS = {"$defs", "definitions"}
VARIANTS = {"anyOf", "oneOf"}
SCHEMAS = {"items", "prefixItems", "additionalProperties", *VARIANTS}
OPEN = {"additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}
"""Keywords by which an object has properties beside those of `properties`."""
BESIDE_A_REFERENCE = {"$ref", *DEFINITIONS, "$schema", "$id", "$comment", "title", "description", "default", "examples"}
"""Keywords that bind nothing where they stand beside `$ref`."""

Schema = dict[str, Any]


def check_schema(schema: Schema, param: str) -> None:
    """Raise InvalidRequest, on `param`, for numbers and patterns that llguidance does not take without harm, and for references
    that lead on and on."""
    nodes = list(_nodes(schema))
    numbers = [node for node in nodes if isinstance(node, int | float)]
    bounds = [node[name] for node in nodes if isinstance(node, dict) for name in BOUNDS & node.keys()]
    small = [bound for bound in bounds if isinstance(bound, int | float) and 0 < abs(bound) < SMALLEST]
    if small or any(abs(number) > LARGEST for number in numbers):
        raise InvalidRequest(f"{param}: numbers may be as large as 2^53, and bounds as small as {SMALLEST:f}", param=param)
    try:
        met = _patterns_met(schema, schema, {})
    except RecursionError:
        raise InvalidRequest(f"{param}: one reference leads to another too often", param=param) from None
    if met > MAX_PATTERNS:
        raise InvalidRequest(f"{param}: a text can be held to at most {MAX_PATTERNS} patterns and formats at once", param=param)


def _nodes(value: Any) -> Iterator[Any]:
    yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(child)


def _patterns_met(node: Any, root: Schema, known: dict[str, int]) -> int:
    """The most patterns that one text within the node may have to fit at once; `known` are those of references."""
    if isinstance(node, list):
        return max((_patterns_met(one, root, known) for one in node), default=0)
    if not isinstance(node, dict):
        return 0
    own = ("pattern" in node) + ("format" in node) + len(node.get("patternProperties") or ())
    inner = [child for name in SCHEMAS_BY_NAME for child in _values(node.get(name))]
    inner += [node.get(name) for name in ("items", "prefixItems", "additionalProperties")]
    met = max(own, *(_patterns_met(child, root, known) for child in inner))
    met += sum(_patterns_met(one, root, known) for one in _values(node.get("allOf")))
    met += max(_patterns_met(node.get(name), root, known) for name in ("anyOf", "oneOf"))
    if isinstance(reference := node.get("$ref"), str):
        if reference not in known:
            known[reference] = 0  # one that leads to itself
            known[reference] = _patterns_met(_target(reference, root), root, known)
        met += known[reference]
    return met


def _values(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def _target(reference: str, root: Schema) -> Any:
    node: Any = root
    for step in reference.removeprefix("#").split("/")[1:]:
        node = node.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else None
    return node


def closed(schema: Any) -> Any:
    """The schema, where objects that list their properties and say nothing of others have no others: a weak model would never stop
    to make some up. XGrammar reads schemas so too. Definitions stay open where others may extend them."""
    extended = any(isinstance(node, dict) and _extends(node) for node in _nodes(schema))
    return _closed(schema, SCHEMAS_BY_NAME if extended else SCHEMAS_BY_NAME | DEFINITIONS)


def _extends(node: Schema) -> bool:
    return "allOf" in node or ("$ref" in node and bool(node.keys() - BESIDE_A_REFERENCE))


def _closed(schema: Any, by_name: set[str]) -> Any:
    if isinstance(schema, list):
        return [_closed(one, by_name) for one in schema]
    if not isinstance(schema, dict):
        return schema
    out = dict(schema)
    inner = SCHEMAS - VARIANTS if "properties" in schema else SCHEMAS  # its variants have these properties too
    for key, value in schema.items():
        if key in by_name and isinstance(value, dict):
            out[key] = {name: _closed(one, by_name) for name, one in value.items()}
        elif key in inner:
            out[key] = _closed(value, by_name)
    return out if "properties" not in out or OPEN & out.keys() else {**out, "additionalProperties": False}
