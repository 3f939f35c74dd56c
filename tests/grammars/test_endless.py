"""Schemas that require themselves without end are found, and none that some finite JSON satisfies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from support.grammars import takes

from aurora_lit.grammars import endless
from aurora_lit.grammars.definition import fault_of
from aurora_lit.grammars.endless import endless_place
from aurora_lit.request import StructuredOutputsParams

Schema = dict[str, Any]
TREE, NODE = {"$ref": "#"}, {"$ref": "#/$defs/node"}
REASON = "no answer can follow the grammar: it requires itself without end; make this optional"


def node(child: Schema, *required: str) -> Schema:
    properties = {"value": {"type": "string"}, "child": child}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        (TREE, ""),
        (node(TREE, "child", "value"), ".properties.child"),
        ({"type": "array", "items": TREE, "minItems": 1}, ".items"),
        (node({"type": "array", "items": TREE, "minItems": 2}, "child"), ".properties.child.items"),
        (node({"anyOf": [TREE, {"allOf": [{}, TREE]}]}, "child"), ".properties.child.anyOf"),
        ({"allOf": [{"type": "object"}, NODE], "$defs": {"node": node(NODE, "child")}}, ".allOf[1]"),
        (
            {**NODE, "$defs": {"node": node({"$ref": "#/$defs/other"}, "child"), "other": node(NODE, "child")}},
            "",
        ),
        ({**NODE, "$defs": {"node": {"anyOf": [NODE, {"$ref": "#/$defs/b"}]}, "b": node(NODE, "child")}}, ""),
    ],
    ids=json.dumps,
)
def test_a_schema_without_finite_json_is_refused_with_the_place(schema: Schema, place: str) -> None:
    assert endless_place(schema) == place
    assert fault_of(StructuredOutputsParams(json=json.dumps(schema))) == (place, REASON)


@pytest.mark.parametrize(
    ("schema", "instance"),
    [
        (node(TREE, "value"), {"value": "a"}),
        (node({"anyOf": [TREE, {"type": "null"}]}, "value", "child"), {"value": "a", "child": None}),
        (node({"type": "array", "items": TREE}, "child"), {"child": []}),
        ({"type": "array", "items": {"anyOf": [{"type": "integer"}, TREE]}, "minItems": 1}, [1]),
        ({"properties": {"child": TREE}, "required": ["child"]}, 7),  # an object is not required
        ({"items": TREE, "minItems": 1}, 7),
        (
            {"type": "object", "required": ["child"], "additionalProperties": TREE, "properties": {"child": {}}},
            {"child": 1},
        ),
        ({**NODE, "$defs": {"node": node({"$ref": "#/$defs/leaf"}, "child"), "leaf": {"enum": [1]}}}, {"child": 1}),
        ({"type": "integer", "$defs": {"node": node(NODE, "child")}}, 7),
        ({"const": {"$ref": "#"}}, {"$ref": "#"}),
        (node({"anyOf": [NODE, {"enum": [1]}]}, "child") | {"$defs": {"node": node(NODE, "child")}}, {"child": 1}),
        # The reference means the definition inside its own document.
        (
            {
                "$ref": "#/$defs/x",
                "$defs": {
                    "x": {"$id": "http://a/x", **node({"$ref": "#/$defs/y"}, "child"), "$defs": {"y": {"enum": [1]}}},
                    "y": node({"$ref": "#/$defs/y"}, "child"),
                },
            },
            {"child": 1},
        ),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_schema_with_finite_json_is_not(schema: Schema, instance: Any) -> None:
    assert Draft202012Validator(schema).is_valid(instance)
    assert takes(f"start: %json {json.dumps(schema)}", json.dumps(instance))
    assert endless_place(schema) is None
    assert fault_of(StructuredOutputsParams(json=schema)) is None


@pytest.mark.parametrize("direction", [1, -1])
def test_a_long_chain_of_required_definitions_ends_in_any_order(direction: int) -> None:
    parts = [(f"a{i}", node({"$ref": f"#/$defs/a{i + 1}"}, "child")) for i in range(1000)]
    chain: Any = {"$ref": "#/$defs/a0", "$defs": {**dict(parts[::direction]), "a1000": {"type": "string"}}}
    assert endless_place(chain) is None
    chain["$defs"]["a1000"] = {"$ref": "#/$defs/a7"}
    assert endless_place(chain) == ""


def wide(count: int) -> Schema:
    names = [f"p{i}" for i in range(count)]
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names}


NESTED = [f"#/$defs/node{'/allOf/0' * i}" for i in range(30)]
SPELT = [f"#/$defs/{''.join(f'%{ord(c):x}' if i >> n & 1 else c for n, c in enumerate('node'))}" for i in range(16)]


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("references", [NESTED, SPELT], ids=["nested", "spelt otherwise"])
def test_each_part_is_looked_at_once(references: list[str], direction: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from clients must not take a time that grows with its square."""
    seen, needed = list[Schema](), endless._needed

    def noted(part: Schema) -> Any:
        seen.append(part)
        return needed(part)

    monkeypatch.setattr(endless, "_needed", noted)
    last = wide(20)
    last["properties"]["p19"] = NODE
    for _ in range(40):
        last = {"allOf": [last]}
    chain = {f"a{i}": node({"$ref": f"#/$defs/a{i + 1}"}, "child") for i in range(50)}
    options = [{"$ref": reference} for reference in references[::direction]]
    schema = {"anyOf": [*options, {"$ref": "#/$defs/a0"}], "$defs": {"node": last, **chain, "a50": NODE}}
    assert endless_place(schema) == ".anyOf"
    assert len(seen) == len({id(part) for part in seen})


def test_references_that_are_no_part_of_the_schema_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = list[str]()
    monkeypatch.setattr(endless, "target_of", lambda _, reference: looked_up.append(reference))
    schema = {"$defs": {"a": TREE}, "const": TREE, "examples": [TREE], "default": TREE, "enum": [TREE]}
    assert endless_place(schema) is None
    assert not looked_up


def test_required_names_are_not_searched_for_one_by_one() -> None:
    class Names(list[str]):
        def __contains__(self, name: object) -> bool:
            raise AssertionError("a time that grows with the square of their number")

    schema = wide(3)
    assert endless_place({**schema, "required": Names(schema["required"])}) is None
