"""The grammar of calls takes just those answers that the request allows."""

from __future__ import annotations

from typing import Any

import pytest
from support.grammars import byte_tokenizer, takes

from aurora_lit.grammars.definition import fault_of
from aurora_lit.request import StructuredOutputsParams
from aurora_lit.tool_calls.formats import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, PLAIN, ToolCall, ToolFormat
from aurora_lit.tool_calls.grammar import MAX_CALLS, grammar_of_calls

FORMATS = (HERMES, MISTRAL, MISTRAL_NAMED, LLAMA3, PLAIN)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
SCHEMAS = {"f": SCHEMA, "g": {"type": "object"}}
ONE, TWO = [ToolCall("f", '{"a": 12}')], [ToolCall("g", '{"b": "}"}'), ToolCall("f", '{"a": 3}')]
WRONG = [ToolCall("f", '{"a": "12"}')]


def grammar(format_: ToolFormat, **how: Any) -> str:
    return grammar_of_calls(format_, SCHEMAS, **{"must_call": True, "only_one": False, **how})


@pytest.mark.parametrize("format_", FORMATS, ids=lambda each: each.name)
def test_a_required_call_has_valid_arguments_and_nothing_around_it(format_: ToolFormat) -> None:
    required = grammar(format_)
    assert takes(required, format_.written(ONE))
    assert takes(required, format_.written(TWO))
    for text in ("", "Hello", format_.written(WRONG), format_.written(ONE) + " so", "So " + format_.written(ONE)):
        assert not takes(required, text), text
    assert not takes(required, format_.written([ToolCall("h", "{}")]))


@pytest.mark.parametrize("format_", FORMATS, ids=lambda each: each.name)
def test_only_one_call_is_only_one(format_: ToolFormat) -> None:
    single = grammar(format_, only_one=True)
    assert takes(single, format_.written(ONE))
    assert not takes(single, format_.written(TWO))


@pytest.mark.parametrize("format_", FORMATS, ids=lambda each: each.name)
def test_calls_come_to_an_end(format_: ToolFormat) -> None:
    many = grammar(format_)
    assert takes(many, format_.written(ONE * MAX_CALLS))
    assert not takes(many, format_.written(ONE * (MAX_CALLS + 1)))


@pytest.mark.parametrize("format_", FORMATS, ids=lambda each: each.name)
def test_an_answer_that_need_not_call_is_any_text_but_its_calls_are_valid(format_: ToolFormat) -> None:
    free = grammar(format_, must_call=False)
    for text in ("Hello\nthere.", "a < b", " Hello", "\n\nHello", format_.written(ONE), format_.written(TWO)):
        assert takes(free, text), text
    assert not takes(free, format_.written(WRONG))
    assert not takes(free, "\n" + format_.written(WRONG))
    if format_.marker:
        assert takes(free, "Let me see.\n" + format_.written(ONE))
        assert not takes(free, "Let me see.\n" + format_.written(WRONG))


@pytest.mark.parametrize("signs", [(), ("<tool_call>",)])
def test_an_answer_that_need_not_call_may_leave_out_the_marker_and_its_calls_are_valid(signs: tuple[str, ...]) -> None:
    made = byte_tokenizer(*signs)
    tokens = {sign: made.token_to_id(sign) for sign in signs}
    free = grammar(HERMES, must_call=False, special=tokens)
    call, wrong = '{\n  "name": "f",\n  "arguments": {"a": 12}\n}', '{"name": "f", "arguments": {"a": "12"}}'
    other = '{"name": "h", "arguments": {"a": "12"}}'
    for text in (
        call,
        f"So:\n```json\n{call}\n```\nDone.",
        f"[{call}, {call}]",
        f"{call}\n{HERMES.written(TWO)}",
        other,
    ):
        assert takes(free, text, *signs), text
    for text in (
        wrong,
        f"```\n{wrong}\n```",
        f"{call}\n{wrong}",
        f"{call}\n{HERMES.written(WRONG)}",
        f"{other}{wrong}",
    ):
        assert not takes(free, text, *signs), text


@pytest.mark.parametrize("format_", FORMATS, ids=lambda each: each.name)
def test_with_a_schema_for_content_an_answer_is_of_it_or_calls(format_: ToolFormat) -> None:
    both = grammar(format_, must_call=False, content_schema=SCHEMA)
    assert takes(both, '{"a": 4}')
    assert takes(both, format_.written(ONE))
    for text in ("Hello", '{"a": "4"}', format_.written(WRONG)):
        assert not takes(both, text), text


@pytest.mark.parametrize(
    ("format_", "signs"),
    [
        (MISTRAL, ["[TOOL_CALLS]"]),
        (MISTRAL_NAMED, ["[TOOL_CALLS]"]),
        (MISTRAL_NAMED, ["[TOOL_CALLS]", "[ARGS]"]),
        (HERMES, ["<tool_call>"]),
        (HERMES, ["<tool_call>", "</tool_call>"]),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_signs_of_a_format_that_are_special_tokens_are_those(format_: ToolFormat, signs: list[str]) -> None:
    made = byte_tokenizer(*signs)
    ids = {sign: made.token_to_id(sign) for sign in signs}
    for how in ({}, {"must_call": False}):
        special = grammar(format_, special=ids, **how)
        assert takes(special, format_.written(ONE), *signs)
        assert takes(special, format_.written(TWO), *signs)
        assert not takes(special, format_.written(WRONG), *signs)
    assert takes(special, "Hello", *signs)
    assert takes(special, "Hello" + format_.written(ONE), *signs)
    assert not takes(grammar(format_), format_.written(ONE), *signs), "as text they are none"


def test_a_description_may_hold_the_sign_of_another_kind_of_grammar() -> None:
    schema = {**SCHEMA, "description": "a rule such as\nexpr ::= term"}
    of_calls = grammar_of_calls(HERMES, {"f": schema}, must_call=True, only_one=True)
    assert fault_of(StructuredOutputsParams(grammar=of_calls)) is None
    assert takes(of_calls, HERMES.written(ONE))
    assert not takes(of_calls, HERMES.written(WRONG))


def test_keywords_that_constrain_nothing_are_left_out_of_arguments_and_content() -> None:
    schema = {**SCHEMA, "properties": {"a": {"type": "string", "format": "path"}}}
    both = grammar_of_calls(HERMES, {"f": schema}, must_call=False, only_one=True, content_schema=schema)
    assert fault_of(StructuredOutputsParams(grammar=both)) is None
    for arguments, is_valid in (('{"a": "/tmp"}', True), ('{"a": 1}', False)):
        assert takes(both, arguments) == is_valid
        assert takes(both, HERMES.written([ToolCall("f", arguments)])) == is_valid


@pytest.mark.parametrize("own", [{"coerce_one_of": True}, {"key_separator": ": "}, {}, None, 5])
def test_what_a_schema_says_of_its_own_json_changes_nothing_else(own: Any) -> None:
    schema = {**SCHEMA, "x-guidance": own}
    both = grammar_of_calls(HERMES, {"f": schema}, must_call=False, only_one=True, content_schema=schema)
    for arguments, is_valid in (('{"a": 12}', True), ('{ "a": 12}', False), ('{"a": \n 12}', False)):
        assert takes(both, arguments) == is_valid
        assert takes(both, HERMES.written([ToolCall("f", arguments)])) == is_valid


def test_a_schema_may_ask_for_white_space_and_for_one_of_as_any_of() -> None:
    parts = [{"properties": {name: {"type": "integer"}}, "required": [name]} for name in "ab"]
    asked = {"whitespace_flexible": True, "coerce_one_of": True}
    schema = {"type": "object", "oneOf": parts, "x-guidance": asked}
    calls = grammar_of_calls(HERMES, {"f": schema}, must_call=True, only_one=True)
    for arguments, is_valid in (('{"a": 1}', True), ('{ "b" : 1}', True), ('{"a": "1"}', False), ("{}", False)):
        assert takes(calls, HERMES.written([ToolCall("f", arguments)])) == is_valid, arguments
