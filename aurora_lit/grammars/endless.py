"""Where a JSON schema requires itself without end, so that no answer can follow it.

    endless_place({"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"})     # ".properties.a"

llguidance takes such a schema, and an answer would go on to the end of the context. Found is only what is certain: a
schema that some finite JSON satisfies is never named. Left out: an endless part that an answer need not have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote


def endless_place(schema: Any) -> str | None:
    """The keys that lead to a reference without end; None: some finite JSON satisfies the schema, for all we know."""
    if has_inner_root(schema):
        return None
    endless = _endless(schema)
    return _place(schema, endless) if id(schema) in endless else None


def has_id(part: Any) -> bool:
    """True if a schema, or a part of one, has an id."""
    return isinstance(part, dict) and any(isinstance(part.get(name), str) for name in ("$id", "id"))


def has_inner_root(schema: Any) -> bool:
    """True if a part has an id of its own: references inside such a part mean another root."""
    found = [schema]
    while found:
        part = found.pop()
        if isinstance(part, dict):
            if part is not schema and has_id(part):
                return True
            found += part.values()
        elif isinstance(part, list):
            found += part
    return False


def target_of(schema: Any, reference: str) -> Any:
    """What a reference inside the schema means; None: unknown."""
    start, *keys = unquote(reference).split("/")
    try:
        for key in keys:
            schema = schema[int(key) if isinstance(schema, list) else key.replace("~1", "/").replace("~0", "~")]
    except (KeyError, IndexError, ValueError, TypeError):
        return None
    return schema if start == "#" else None


def _endless(schema: Any) -> set[int]:
    """The ids of those parts that no finite JSON satisfies, of all that the schema needs or may choose.

    Each is looked at once: a part is finite as soon as each of its conditions has a finite option.
    """
    unmet, found, finite = dict[int, int](), [schema], list[int]()
    conditions_with = defaultdict[int, list[list[int]]](list)
    """By option. A condition is a list of the part that has it, and empty once it is met."""
    while found:
        part = found.pop()
        if id(part) in unmet:
            continue
        conditions = list(_conditions(part, schema))
        unmet[id(part)] = len(conditions)
        finite += [] if conditions else [id(part)]
        for options in conditions:
            condition = [id(part)]
            for option in options:
                conditions_with[id(option)].append(condition)
            found += options
    while finite:
        for condition in filter(None, conditions_with[finite.pop()]):
            part_id = condition.pop()
            unmet[part_id] -= 1
            finite += [] if unmet[part_id] else [part_id]
    return {part_id for part_id, count in unmet.items() if count}


def _conditions(part: Any, schema: Any) -> Iterator[list[Any]]:
    """Lists of schemas: of each list one must have finite JSON, or the part of the whole schema has none."""
    if not isinstance(part, dict):
        return
    if isinstance(part.get("$ref"), str):
        yield [target_of(schema, part["$ref"])]
        return
    for name in ("anyOf", "oneOf"):
        if isinstance(part.get(name), list) and part[name]:
            yield part[name]
    yield from ([needed] for _, needed in _needed(part))


def _place(part: dict[str, Any], endless: set[int]) -> str:
    """The keys that lead to an endless reference, from a part that is endless."""
    if isinstance(part.get("$ref"), str):
        return ""
    for name in ("anyOf", "oneOf"):
        options = part.get(name)
        if isinstance(options, list) and options and all(id(option) in endless for option in options):
            return f".{name}"
    keys, needed = next((keys, needed) for keys, needed in _needed(part) if id(needed) in endless)
    return keys + _place(needed, endless)


def _needed(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas that a part of every JSON of the schema must satisfy, or all of it."""
    kind, properties, required = schema.get("type"), schema.get("properties"), schema.get("required")
    if kind == "object" and isinstance(properties, dict) and isinstance(required, list):
        names = {name for name in required if isinstance(name, str)}
        yield from ((f".properties.{name}", properties[name]) for name in properties if name in names)
    if kind == "array" and schema.get("minItems") and "prefixItems" not in schema:
        yield ".items", schema.get("items")
    if isinstance(schema.get("allOf"), list):
        yield from ((f".allOf[{index}]", part) for index, part in enumerate(schema["allOf"]))
