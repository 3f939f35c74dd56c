"""Faults of schemas and grammars: each with its reason and its place."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from support.grammars import backend
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aurora_lit.grammars import definition
from aurora_lit.grammars.definition import fault_of, grammar_of, names_special_tokens
from aurora_lit.grammars.matcher import GrammarCompiler
from aurora_lit.models.tokenizer import tokenizer_json
from aurora_lit.request import StructuredOutputsParams

DEEP = {"type": "object", "properties": {"a": {"type": "array", "items": {"anyOf": [True, {"type": "numbr"}]}}}}


def chain(length: int) -> dict[str, Any]:
    """A schema whose definitions refer to one another."""
    parts: dict[str, Any] = {
        f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(length)
    }
    return {"$defs": {**parts, f"a{length}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def test_a_long_chain_of_definitions_does_not_end_the_process_and_a_longer_one_is_refused() -> None:
    long = StructuredOutputsParams(json=json.dumps(chain(1200)))
    assert fault_of(long) is None
    state = tokenizer_json(backend())
    compiler = GrammarCompiler(lambda: state, vocab_size=backend().get_vocab_size(), eos_token_ids=frozenset([0]))
    assert compiler.compile(long, end_tokens=frozenset([0])).result().allowed.any()
    fault = fault_of(StructuredOutputsParams(json=json.dumps(chain(2000))))
    assert "may have 131072" in fault.reason


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"type": "strin"}, "", "Invalid type: strin"),
        (DEEP, ".properties.a.items.anyOf[1]", "Invalid type: numbr"),
        ({"$defs": {"x": {"pattern": "(["}}, "$ref": "#/$defs/x"}, ".$defs.x", "unclosed character class"),
        ({"items": {"$ref": "#/$defs/x"}, "$defs": {"y": {}}}, ".items", "'/$defs/x' does not exist"),
        ({"properties": {"a": {"uniqueItems": True}}}, ".properties.a", 'Unimplemented keys: ["uniqueItems"]'),
        ({"prefixItems": [{}, {"type": "blah"}]}, ".prefixItems[1]", "Invalid type: blah"),
        ({"format": "blah", "properties": {"a": {"format": "blah", "type": "numbr"}}}, ".properties.a", "type: numbr"),
        ({"propertyNames": {"type": "string", "minLength": 1}}, "", 'Unimplemented keys: ["propertyNames"]'),
        ({"properties": 5}, "", "properties must be an object"),
        ({"minLength": 5, "maxLength": 2, "type": "string"}, "", "Unsatisfiable schema"),
        ({"additionalProperties": {"not": {}}}, ".additionalProperties", "Unimplemented keys"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_a_fault_of_a_schema_has_the_keys_that_lead_to_it(
    schema: dict[str, Any], place: str, reason: str, as_text: bool
) -> None:
    fault = fault_of(StructuredOutputsParams(json=json.dumps(schema) if as_text else schema))
    assert fault.place == place
    assert reason in fault.reason
    assert "\n" not in fault.reason


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"regex": "a("}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"grammar": 'start: "a" x'}, 'at 1(8): unknown name: "x"'),
        ({"grammar": 'root ::= "a" | y'}, "Rule 'y' not found"),
        ({"grammar": "nothing"}, "1("),
        ({"json": "{"}, "Expecting property name"),
        ({"json": '{"items":' * 5000 + "{}" + "}" * 5000}, "recursion"),
        ({"json": '{"items":' * 500 + "{}" + "}" * 500}, "recursion"),
    ],
)
def test_a_fault_of_other_grammars_has_its_line_and_column(asked: dict[str, Any], reason: str) -> None:
    fault = fault_of(StructuredOutputsParams(**asked))
    assert reason in fault.reason
    assert len(fault.reason) <= 240


@pytest.mark.parametrize(
    "asked",
    [
        {"json": {"type": "object"}},
        {"json_object": True},
        {"regex": "[ab]+"},
        {"choice": ("a", 'b"\n', "")},
        {"grammar": 'root ::= "a" | "b" x\nx ::= [0-9]+'},
        {"grammar": 'start: "a" | x\nx: /[0-9]+/'},
    ],
)
def test_every_kind_can_be_used(asked: dict[str, Any]) -> None:
    assert fault_of(StructuredOutputsParams(**asked)) is None


def test_special_tokens_are_looked_up_in_the_tokenizer() -> None:
    known, unknown = (StructuredOutputsParams(grammar=f'start: "a" {name}') for name in ("<end>", "<nothing>"))
    plain = StructuredOutputsParams(grammar='start: "a"')
    assert [names_special_tokens(each) for each in (known, unknown, plain)] == [True, True, False]
    tokenizer = LLTokenizer(backend().to_str(), eos_token=8)
    assert fault_of(known, tokenizer) is None
    fault = fault_of(unknown, tokenizer)
    assert "<nothing>" in fault.reason


def test_json_is_spaced_as_by_json_dumps_unless_the_schema_asks_otherwise() -> None:
    schema = {"type": "object", "properties": {"a": {"const": [1, 2]}}, "required": ["a"]}
    flexible = {"x-guidance": {"whitespace_flexible": True, "item_separator": ",", "key_separator": ":"}, **schema}
    ours, theirs = (grammar_of(StructuredOutputsParams(json=each)) for each in (schema, flexible))
    assert accepts(ours, '{"a": [1, 2]}')
    assert not accepts(ours, '{ "a":[1,\n2]}')
    assert accepts(theirs, '{ "a":[1,\n2]}')


NAMED_LIKE_KEYWORDS = {
    "type": "object",
    "properties": {
        "format": {"const": "blah"},
        "uniqueItems": {"enum": [False]},
        "propertyNames": {"type": "string"},
        "$schema": {"type": "integer"},
    },
    "required": ["format", "uniqueItems", "propertyNames", "$schema"],
    "additionalProperties": False,
}
NAMED_SO = {"format": "blah", "uniqueItems": False, "propertyNames": "a", "$schema": 1}


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "string", "format": "password", "maxLength": 3}, ["abc"], ["abcd", 7]),
        ({"type": "string", "format": "uuid4"}, ["9b2b8f6e-4a46-4f0e-9d0c-0a4b5c6d7e8f"], ["9b2b8f6e", 7]),
        ({"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["127.0.0", "localhost"]),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": False}, [[1, 1], []], [["1"], {}]),
        (
            {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
            [{"a": 1}, {}],
            [{"a": "1"}, []],
        ),
        ({"$schema": "http://json-schema.org/schema#", "type": "integer"}, [1], ["1"]),
        ({"$schema": "https://json-schema.org/draft-07/schema", "type": "integer"}, [1], ["1"]),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "type": "integer"}, [1], ["1"]),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "string", "format": "path"}, {"type": "null"}]}}},
            ["/tmp", None],
            [1],
        ),
        (
            {
                "$ref": "#/components/schemas/a",
                "components": {
                    "schemas": {
                        "a": {
                            "type": "array",
                            "items": {"anyOf": [{"$ref": "#/x/0"}, {"$ref": "#/components/schemas/a"}]},
                        }
                    }
                },
                "x": [{"type": "string", "format": "path", "uniqueItems": False}],
            },
            [["/tmp", ["/tmp"]]],
            [[1]],
        ),
        ({"prefixItems": [{"format": "binary", "type": "string"}], "items": False, "type": "array"}, [["a"]], [[1]]),
        (NAMED_LIKE_KEYWORDS, [NAMED_SO], [{**NAMED_SO, "format": "x"}, {**NAMED_SO, "$schema": "a"}, {}]),
        ({"const": NAMED_SO}, [NAMED_SO], [{}, {**NAMED_SO, "format": "x"}]),
        ({"enum": [{"format": "blah"}, 7], "default": {"format": "blah"}}, [{"format": "blah"}, 7], [{}]),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_keywords_that_constrain_nothing_are_left_out_and_nothing_else(
    schema: dict[str, Any], valid: list[Any], invalid: list[Any]
) -> None:
    assert fault_of(StructuredOutputsParams(json=schema)) is None
    grammar = grammar_of(StructuredOutputsParams(json=schema))
    for instance in valid:
        assert accepts(grammar, json.dumps(instance)), instance
    for instance in invalid:
        assert not accepts(grammar, json.dumps(instance)), instance


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"const": 2**53 + 1}, ".const"),
        ({"const": -(2**53) - 1}, ".const"),
        ({"const": {"a": [True, {"b": 1234567890123456789}]}}, ".const"),
        ({"properties": {"id": {"anyOf": [{}, {"enum": [1, 10**30]}]}}}, ".properties.id.anyOf[1].enum"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"items": {"const": 2**60 + 1}}}}, ".$defs.a.items.const"),
        ({"const": 2**63}, ".const"),
        ({"enum": [10**300]}, ".enum"),
        (
            {
                "properties": {"a": {"$ref": "#/components/schemas/a"}},
                "components": {"schemas": {"a": {"allOf": [{"$ref": "#/x~1y"}, {"$ref": "#/components/schemas/a"}]}}},
                "x/y": {"const": 2**53 + 1},
            },
            ".x~1y.const",
        ),
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("as_text", [False, True])
def test_an_integer_that_would_come_out_as_another_is_refused(
    schema: dict[str, Any], place: str, as_text: bool
) -> None:
    fault = fault_of(StructuredOutputsParams(json=json.dumps(schema) if as_text else schema))
    assert fault == (place, "an integer beyond 2^53 would be rounded; use a string")


LEAST = -(2**63)


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ({"json": {"const": LEAST}}, ".const"),
        ({"json": {"enum": [0, {"a": [LEAST]}]}}, ".enum"),
        ({"json": {"type": "integer", "minimum": LEAST, "maximum": LEAST + 512}}, ".maximum"),
        ({"json": {"$ref": "#/a", "a": {"type": "integer", "minimum": -1e300, "maximum": -1e300}}}, ".a.maximum"),
        ({"json": {"type": "integer", "minimum": LEAST, "exclusiveMaximum": LEAST + 1}}, ".exclusiveMaximum"),
        ({"json": {"properties": {"a": {"enum": [1, -1e20]}}}}, ".properties.a.enum"),
        ({"json": {"$id": "#/y", "type": "object", "y": {"const": LEAST}}}, ""),
        ({"json": {"$id": "http://a/", "$ref": "http://a/#/x", "x": {"const": LEAST}}}, ""),
        ({"json": {"$ref": "#x", "x": [{"$anchor": "x", "enum": [{"const": LEAST}]}]}}, ""),
        ({"json": {"$ref": "#/x", "x": {"$id": "http://a/", "$ref": "#/y", "y": {"maximum": -1e20}}, "y": {}}}, ""),
        ({"grammar": f'start: %json {{"const": {LEAST}}}'}, ""),
        ({"grammar": 'start: %json {"type": "integer", "minimum": -1e19, "maximum": -9.3e+18}'}, ""),
    ],
    ids=str,
)
def test_an_integer_that_ends_the_process_is_refused_before_it_is_read(
    asked: dict[str, Any], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A range of -2^63 alone: llguidance calls itself without end."""

    def read(*_: Any) -> str:
        raise AssertionError("the process would have ended")

    monkeypatch.setattr(definition, "_reason", read)
    fault = fault_of(StructuredOutputsParams(**asked))
    assert fault.place == place


def test_great_numbers_elsewhere_are_read() -> None:
    bounds = {"type": "number", "minimum": -1e18, "maximum": 1e18, "default": LEAST}
    assert fault_of(StructuredOutputsParams(json=bounds)) is None
    noted = {"maximum": -1e300, "enum": [-1e300]}
    for schema in (
        {"type": "object", "examples": [noted], "default": noted},
        {"type": "object", "properties": {"maximum": {"type": "object", "default": noted}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "examples": [noted]}}},
    ):
        assert fault_of(StructuredOutputsParams(json=schema)) is None
    for grammar in (f'start: "{LEAST}"', 'start: %json {"const": -9.2e18}'):
        assert fault_of(StructuredOutputsParams(grammar=grammar)) is None
    assert fault_of(StructuredOutputsParams(choice=(str(LEAST),))) is None


def test_no_part_is_read_alone_that_would_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """There its reference means its own example."""
    monkeypatch.setattr(definition, "_reason", lambda *_: "a reason")
    a = {"$ref": "#/part/examples/0", "examples": [{"const": LEAST}]}
    schema = {"part": {"examples": [{}]}, "properties": {"a": a, "b": {"type": "numbr"}}}
    assert fault_of(StructuredOutputsParams(json=schema)) == (".properties.b", "a reason")


def test_the_place_of_a_fault_is_not_looked_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part would be compiled alone, with all definitions."""
    compiled = list[str]()
    reason = definition._reason
    monkeypatch.setattr(definition, "_reason", lambda *grammar: (compiled.append("x"), reason(*grammar))[1])
    parts = [{}] * 2000
    fault = fault_of(StructuredOutputsParams(json={"anyOf": [*parts, {"type": "strin"}], "$defs": {}}))
    assert fault is not None
    assert fault.place == ""
    assert "strin" in fault.reason
    assert len(compiled) <= 1 + 32


def test_nested_values_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from clients must not take a time that grows with its square."""
    seen, has_least = list[Any](), definition._has_least

    def noted(value: Any) -> bool:
        seen.append(value)
        return has_least(value)

    monkeypatch.setattr(definition, "_has_least", noted)
    monkeypatch.setattr(definition, "_reason", lambda *_: "")
    value: Any = 7
    for _ in range(60):
        value = {"const": value}
    assert fault_of(StructuredOutputsParams(json={"$ref": "#x", "x": {"$anchor": "x", "const": value}})) is None
    assert len(list(filter(None, seen))) == 61


@pytest.mark.parametrize(
    "value",
    [
        *(2**53, -(2**53), 2**54, 2**60, -(2**62), 10**18, 2**63 - 1024, -(2**63) + 2048),
        *("1234567890123456789", 1e20, 0.1, [2**53, None], {"a": 1}),
    ],
)
def test_an_exact_value_is_written_as_it_is(value: Any) -> None:
    elsewhere = {"default": 2**60 + 1, "properties": {"const": {"default": 2**60 + 1}}}
    schema = {"const": value, **elsewhere}
    assert fault_of(StructuredOutputsParams(json=schema)) is None
    grammar = grammar_of(StructuredOutputsParams(json=schema))
    assert accepts(grammar, str(10**20) if value == 1e20 else json.dumps(value))
    assert not accepts(grammar, "7")


@pytest.mark.parametrize("name", definition._FORMATS)
def test_formats_that_are_kept_are_known(name: str) -> None:
    assert fault_of(StructuredOutputsParams(json={"type": "string", "format": name})) is None


def accepts(grammar: str, text: str) -> bool:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    matcher = LLMatcher(LLTokenizer(tokenizer.to_str(), eos_token=256), grammar)
    ids = tokenizer.encode(text).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_both_kinds_of_grammar_are_told_apart_and_a_long_one_in_gbnf_is_not_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for text in (
        'root ::= x-start\nx-start ::= "start: a"',
        'start: "::="',
        '?start: x\nx: "::="',
        '  %llguidance {}\n\nstart: A\nA: "b ::= c"',
    ):
        assert fault_of(StructuredOutputsParams(grammar=text)) is None, text
    long = "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(1100)) + 'r1100 ::= "a"'

    def convert(_: str) -> str:
        raise AssertionError("minutes")

    monkeypatch.setattr(definition, "gbnf_to_lark", convert)
    for text in (long, f'root ::= "{"a" * 200_000}"'):
        fault = fault_of(StructuredOutputsParams(grammar=text))
        assert "in GBNF, and may have 1000 and 131072; write it in Lark" in fault.reason
