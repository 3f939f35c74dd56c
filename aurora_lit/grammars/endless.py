"""Where a JSON schema requires itself without end, so that no answer can follow it.

    endless_place({"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"})     # ".properties.a"

llguidance takes such a schema, and an answer would go on to the end of the context. Found is only what is certain: a
schema that some finite JSON satisfies is never named. Left out: an endless part that an answer need not have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import unquote

_MOST_PASSES = 100
"""Over all references. Definitions are mostly written before those they refer to or after, and then one or two do."""


def endless_place(schema: Any) -> str | None:
    """The keys that lead to a reference without end; None: some finite JSON satisfies the schema, for all we know."""
    objects = list(_objects(schema))
    if any(isinstance(part.get(name), str) for part in objects[1:] for name in ("$id", "id")):
        return None  # references inside such a part mean another root
    references = dict.fromkeys(part["$ref"] for part in objects if isinstance(part.get("$ref"), str))
    endless = {reference: target for reference in references if (target := _target(schema, reference)) is not None}
    for number in range(_MOST_PASSES):
        before = len(endless)
        for reference in list(endless)[:: 1 if number % 2 else -1]:
            if _place(endless[reference], endless) is None:
                del endless[reference]
        if len(endless) == before:
            return _place(schema, endless)
    return None


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in a value, the outermost first."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _objects(part)


def _target(schema: Any, reference: str) -> Any:
    """What a reference inside the schema means; None: unknown."""
    start, *keys = unquote(reference).split("/")
    try:
        for key in keys:
            schema = schema[int(key) if isinstance(schema, list) else key.replace("~1", "/").replace("~0", "~")]
    except (KeyError, IndexError, ValueError, TypeError):
        return None
    return schema if start == "#" else None


def _place(schema: Any, endless: Collection[str]) -> str | None:
    """The keys that lead to an endless reference, in what every JSON of the schema has; None: there is none."""
    if not isinstance(schema, dict):
        return None
    if isinstance(schema.get("$ref"), str):
        return "" if schema["$ref"] in endless else None
    for name in ("anyOf", "oneOf"):
        options = schema.get(name)
        if isinstance(options, list) and options and all(_place(each, endless) is not None for each in options):
            return f".{name}"
    places = (keys + place for keys, part in _needed(schema) if (place := _place(part, endless)) is not None)
    return next(places, None)


def _needed(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas that a part of every JSON of the schema must satisfy, or all of it."""
    kind, properties, required = schema.get("type"), schema.get("properties"), schema.get("required")
    if kind == "object" and isinstance(properties, dict) and isinstance(required, list):
        yield from ((f".properties.{name}", properties[name]) for name in properties if name in required)
    if kind == "array" and schema.get("minItems") and "prefixItems" not in schema:
        yield ".items", schema.get("items")
    if isinstance(schema.get("allOf"), list):
        yield from ((f".allOf[{index}]", part) for index, part in enumerate(schema["allOf"]))
