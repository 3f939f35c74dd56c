"""What a request's tools mean: a grammar only where calls are promised, special tokens only where one begins a call."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from support import TESTS
from support.fake_engine import tiny_tokenizer
from support.grammars import takes
from tokenizers import AddedToken

from aurora_lit.errors import RequestError
from aurora_lit.grammars.matcher import GrammarCompiler
from aurora_lit.models.tokenizer import tokenizer_json
from aurora_lit.serve.http import tool_use as tool_use_module
from aurora_lit.serve.http.schema import ChatRequest
from aurora_lit.serve.http.tokenize import render
from aurora_lit.serve.http.tool_use import MAX_SCHEMA_CHARACTERS, template_tools, tool_use, turns_of
from aurora_lit.tool_calls.formats import HERMES, ToolCall
from aurora_lit.tool_calls.parser import Arguments, CallBegin

QWEN = (TESTS / "support" / "qwen2.5.jinja").read_text(encoding="utf-8")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
STRICT = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}
LOOSE = {"type": "function", "function": {"name": "g", "parameters": SCHEMA}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "b", "schema": {"enum": [7]}}}


def body(**fields: Any) -> ChatRequest:
    return ChatRequest(**{"messages": [{"role": "user", "content": "hi"}], **fields})


def use_of(template: str = "{{ tools }}<tool_call>", special: tuple[str, ...] = (), **fields: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tool_use(body(**fields), tokenizer)


@pytest.mark.parametrize(
    ("fields", "has_grammar"),
    [
        ({"tools": [LOOSE]}, False),
        ({"tools": [LOOSE], "tool_choice": "auto"}, False),
        ({"tools": [LOOSE, STRICT]}, True),
        ({"tools": [LOOSE], "tool_choice": "required"}, True),
        ({"tools": [LOOSE], "tool_choice": {"type": "function", "function": {"name": "g"}}}, True),
        ({"tools": [LOOSE], "response_format": FORMAT}, True),
    ],
)
def test_a_grammar_where_something_is_promised(fields: dict[str, Any], has_grammar: bool) -> None:
    use = use_of(**fields)
    assert (use.grammar is not None) == has_grammar


def test_only_strict_functions_promise_their_arguments_by_choice() -> None:
    unusable = {"properties": {"a": {"type": "numbr"}}}
    loose: Any = {"type": "function", "function": {"name": "u", "parameters": unusable}}
    use = use_of(tools=[STRICT, loose])
    assert '"a": {"type": "integer"}' in str(use.grammar.grammar)
    with pytest.raises(RequestError, match=r"tools\[1\]\.function\.parameters\.properties\.a cannot be used"):
        use_of(tools=[STRICT, {**loose, "function": {**loose["function"], "strict": True}}])


@pytest.mark.parametrize(
    ("parameters", "takes_object"),
    [
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}'),
        ({"type": ["object", "null"]}, '{"b": 2}'),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"a": {"enum": [1]}}}}}, '{"a": 1}'),
    ],
)
def test_arguments_are_an_object_whatever_the_schema_says_of_its_type(
    parameters: dict[str, Any], takes_object: str
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    use = use_of(tools=[tool], tool_choice="required")
    of_calls = str(use.grammar.grammar)
    assert takes(of_calls, HERMES.written([ToolCall("f", takes_object)]))
    for arguments in ("7", "null", '"text"', "[]"):
        assert not takes(of_calls, HERMES.written([ToolCall("f", arguments)])), arguments


NEEDS_B = {"properties": {"b": {"type": "integer"}}, "required": ["b"]}


@pytest.mark.parametrize(
    ("beside", "valid", "invalid"),
    [
        ({}, ['{"a": 1}', "{}"], ['{"a": 1, "b": 2}', '{"a": "1"}']),
        ({"additionalProperties": {"type": "integer"}}, ['{"a": 1, "b": 2}'], ['{"a": 1, "b": "2"}']),
        ({"allOf": [NEEDS_B]}, ['{"a": 1, "b": 2}', '{"b": 2}'], ['{"a": 1}', '{"a": 1, "b": "2"}']),
        ({"anyOf": [NEEDS_B, {"required": ["a"]}]}, ['{"b": 2}', '{"a": 1}'], ["{}", '{"a": "1"}']),
        ({"anyOf": [{"required": ["b"]}]}, ['{"b": 1}'], ["{}", '{"a": 1}']),
        ({"allOf": [{"additionalProperties": {"type": "integer"}}]}, ['{"b": 2}'], ['{"b": "2"}']),
        ({"anyOf": [{"required": ["a"]}]}, ['{"a": 1}'], ['{"a": 1, "b": 2}', "{}"]),
        ({"allOf": [{"properties": {"a": {"minimum": 3}}}]}, ['{"a": 4}', "{}"], ['{"a": 4, "b": 2}', '{"a": 1}']),
        ({"allOf": [{"anyOf": [NEEDS_B]}]}, ['{"a": 1, "b": 2}', '{"b": 2}'], ['{"a": 1}', '{"a": 1, "b": "2"}']),
        ({"allOf": [{"$ref": "#/$defs/b"}], "$defs": {"b": NEEDS_B}}, ['{"a": 1, "b": 2}'], ['{"a": 1}']),
        ({"required": ["a", "b"]}, ['{"a": 1, "b": "2"}'], ['{"a": 1}', '{"a": "1", "b": 2}']),
        ({"required": ["a"]}, ['{"a": 1}'], ['{"a": 1, "b": 2}', "{}"]),
        ({"oneOf": [NEEDS_B]}, ['{"a": 1, "b": 2}'], ['{"a": 1}', '{"b": "2"}']),
        ({"$ref": "#/$defs/b", "$defs": {"b": NEEDS_B}}, ['{"a": 1, "b": 2}'], ['{"a": 1}', '{"a": "1", "b": 2}']),
    ],
    ids=lambda value: str(value)[:20],
)
def test_arguments_that_schemas_beside_the_properties_name_are_allowed(
    beside: dict[str, Any], valid: list[str], invalid: list[str]
) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}, **beside}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    use = use_of(tools=[tool], tool_choice="required")
    for arguments in (*valid, *invalid):
        taken = takes(str(use.grammar.grammar), HERMES.written([ToolCall("f", arguments)]))
        assert taken == (arguments in valid), arguments


@pytest.mark.parametrize("malformed", [{"properties": 5}, {"allOf": 5}, {"allOf": [5, {"properties": 5}]}], ids=str)
def test_a_malformed_schema_of_arguments_is_refused(malformed: dict[str, Any]) -> None:
    parameters = {"properties": {"a": {}}, "anyOf": [{"properties": {"a": {}}, "required": [["a"]]}], **malformed}
    with pytest.raises(RequestError, match=r"^tools\[0\]\.function\.parameters"):
        use_of(tools=[{"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}])


def test_more_schemas_than_can_be_compiled_in_time_are_refused_and_no_ordinary_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = list[str]()
    monkeypatch.setattr(tool_use_module, "fault_of", lambda asked: compiled.append(str(asked.json)))

    def ask(count: int, characters: int, **fields: Any) -> None:
        schema = {**SCHEMA, "description": "x" * characters}
        tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(count)]
        use_of(tools=tools, **fields)

    ask(128, 3900, tool_choice="required")
    assert len(compiled) == 128
    ask(128, 9000)  # nothing is promised, so that nothing is compiled
    ask(128, 9000, tool_choice={"type": "function", "function": {"name": "f3"}})
    assert len(compiled) == 129
    with pytest.raises(RequestError, match="tools: their parameters have more than") as refused:
        ask(128, 9000, tool_choice="required")
    assert refused.value.param == "tools"
    assert sum(map(len, compiled[129:])) <= MAX_SCHEMA_CHARACTERS


@pytest.mark.parametrize("choice", [None, "none"])
def test_without_callable_tools_nothing_is_read(choice: str | None) -> None:
    assert use_of(tools=[LOOSE] if choice else None, tool_choice=choice) is None


@pytest.mark.parametrize("special", [(), ("[TOOL_CALLS]",), ("[ARGS]",), ("[TOOL_CALLS]", "[ARGS]")])
def test_a_special_token_that_begins_calls_is_shown_and_is_one_in_the_grammar(special: tuple[str, ...]) -> None:
    use = use_of("{{ tools }}[TOOL_CALLS][ARGS]", special, tools=[LOOSE], tool_choice="required")
    assert use.shows_special_tokens == bool(special)
    assert len(set(re.findall(r"<\[\d+\]>", str(use.grammar.grammar)))) == len(special)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("fields", [{"tool_choice": "required"}, {"tools": [STRICT]}])
def test_a_required_call_has_the_tokens_of_its_format_whether_they_are_special_or_text(
    special: bool, fields: dict[str, Any]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = QWEN
    backend = tokenizer.backend_tokenizer
    backend.add_tokens([AddedToken(sign, special=special) for sign in ("<tool_call>", "</tool_call>")])
    use = tool_use(body(**{"tools": [LOOSE], **fields}), tokenizer)
    assert use is not None
    assert use.grammar is not None
    end = tokenizer.eos_token_id
    compiler = GrammarCompiler(
        lambda: tokenizer_json(backend), vocab_size=backend.get_vocab_size(), eos_token_ids=frozenset([end])
    )
    calls = HERMES.written(
        [ToolCall("g" if "tool_choice" in fields else "f", each) for each in ('{"a": 1}', '{"a": 23}')]
    )
    ids = [*tokenizer.encode(calls, add_special_tokens=False), end]
    assert sum(token >= backend.get_vocab_size() - 2 for token in ids) == 4
    in_letters = [*tiny_tokenizer().encode(calls, add_special_tokens=False), end]
    for spelt in [ids] if special else [ids, in_letters]:
        place = compiler.compile(use.grammar, end_tokens=frozenset([end])).result()
        for token in spelt:
            assert np.unpackbits(place.allowed, bitorder="little")[token]
            place.advance([token])
    reader = use.reader()
    shown = tokenizer.decode(ids, skip_special_tokens=not use.shows_special_tokens)
    pieces = [*reader.push(shown), *reader.finish()]
    assert [piece.text for piece in pieces if isinstance(piece, Arguments)] == ['{"a": 1}', '{"a": 23}']


def test_calls_without_the_marker_are_read_unless_the_answer_is_calls_or_json_alone() -> None:
    bare = '{"name": "g", "arguments": {"a": 1}}'
    fields: list[dict[str, Any]] = [
        {},
        {"tools": [LOOSE, STRICT]},
        {"tool_choice": "required"},
        {"response_format": FORMAT},
    ]
    found = []
    for each in fields:
        reader = use_of(**{"tools": [LOOSE], **each}).reader()
        found.append(any(isinstance(piece, CallBegin) for piece in [*reader.push(bare), *reader.finish()]))
    assert found == [True, True, False, False]


def test_qwens_template_shows_the_turns_of_its_training() -> None:
    """Arguments come back as text and are an object there; results of parallel calls share a turn; parts are joined."""
    calls = [
        {"id": name, "type": "function", "function": {"name": "f", "arguments": arguments}}
        for name, arguments in (("x", '{"a": 1}'), ("y", '{"a": "é<"}'))
    ]
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two."}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "x", "content": "1"},
        {"role": "tool", "tool_call_id": "y", "content": [{"type": "text", "text": "2"}]},
        {"role": "assistant", "content": "Wait.", "tool_calls": calls[:1]},
        {"role": "tool", "tool_call_id": "x", "content": "3"},
    ]
    asked = body(messages=turns, tools=[LOOSE])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = QWEN
    text = render(asked.messages, asked, tools=asked.callable_tools, tokenizer=tokenizer)
    system, *rest = text.split("<|im_start|>")[1:]
    assert system.startswith(
        "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n"
    )
    assert f"<tools>\n{json.dumps(LOOSE)}\n</tools>" in system
    first = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert rest == [
        "user\nOne\ntwo.<|im_end|>\n",
        f'assistant\n{first}\n<tool_call>\n{{"name": "f", "arguments": {{"a": "é<"}}}}\n</tool_call><|im_end|>\n',
        "user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n",
        f"assistant\nWait.\n{first}<|im_end|>\n",
        "user\n<tool_response>\n3\n</tool_response><|im_end|>\n",
        "assistant\n",
    ]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [("", {}), ('{"a": 1}', {"a": 1}), ("{a: 1}", "{a: 1}"), ('{"a": 1, "b', '{"a": 1, "b'), ("[1]", "[1]")],
)
@pytest.mark.parametrize("template", ["{{ tools }}", "{{ messages }}"])
def test_every_call_that_an_answer_can_have_may_come_back(text: str, arguments: Any, template: str) -> None:
    """Also one that some servers stream without text, and one that is no JSON or was cut off."""
    call = {"id": "x", "type": None, "function": {"name": "f", "arguments": text}}
    asked = body(messages=[{"role": "assistant", "tool_calls": [call]}], tools=[STRICT])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    turns = turns_of(asked.messages, asked.tools or (), tokenizer)
    if "tools" in template:
        function = {"name": "f", "arguments": arguments}
        assert turns[0]["tool_calls"] == [{"id": "x", "type": "function", "function": function}]
    else:
        assert turns[-1]["content"] == f'{{"name": "f", "arguments": {text or "{}"}}}', "as the model wrote it"


def test_results_have_the_name_of_the_called_function() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "developer", "content": "Be kind."},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "2"},
    ]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ tools }}"
    asked = body(messages=turns, tools=[STRICT])
    system, called, result = turns_of(asked.messages, asked.tools or (), tokenizer)
    assert system == {"role": "system", "content": "Be kind."}
    assert called["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}, "templates expect an object"
    assert result == {"role": "tool", "content": "2", "tool_call_id": "x", "name": "f"}
    assert template_tools(asked.tools or ()) == [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


@pytest.mark.parametrize("special", [True, False])
def test_a_special_token_that_the_tokenizer_does_not_name_is_shown_too(special: bool) -> None:
    """An added token that is marked special gives no text, whether it is among the named ones or not."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ tools }}<tool_call>"
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<tool_call>", special=special)])
    assert "<tool_call>" not in [tokenizer.convert_ids_to_tokens(i) for i in tokenizer.all_special_ids]
    use = tool_use(body(tools=[LOOSE]), tokenizer)
    assert use.shows_special_tokens == special


@pytest.mark.parametrize("form", ["<tool_call><function=", "<tool_call><arg_key>", "<|tool_call_begin|>"])
def test_calls_in_a_form_that_is_not_read_are_refused_unless_a_grammar_makes_them_json(form: str) -> None:
    template = "{{ tools }}" + form
    with pytest.raises(RequestError, match='send tool_choice="required"') as refused:
        use_of(template, tools=[LOOSE])
    assert refused.value.param == "tools"
    for json_alone in ({"tool_choice": "required"}, {"tools": [STRICT]}, {"response_format": FORMAT}):
        assert use_of(template, **{"tools": [LOOSE], **json_alone}) is not None
    assert use_of(template, tools=[LOOSE], tool_choice="none") is None


_SINGLE = "{{ tools }}{{- raise_exception('This model only supports single tool-calls at once!') }}<|python_tag|>"


def test_a_template_that_takes_one_call_a_turn_gets_no_more() -> None:
    """Otherwise the conversation could not go on."""
    use = use_of(_SINGLE, tools=[STRICT, LOOSE])
    calls = [ToolCall("f", '{"a": 1}'), ToolCall("g", '{"a": 2}')]
    assert takes(str(use.grammar.grammar), use.format.written(calls[:1]))
    assert not takes(str(use.grammar.grammar), use.format.written(calls))
    reader = use.reader()
    pieces = [*reader.push(use.format.written(calls)), *reader.finish()]
    assert [piece.name for piece in pieces if isinstance(piece, CallBegin)] == ["f"]
    several = use_of("{{ tools }}<|python_tag|>", tools=[STRICT, LOOSE])
    assert takes(str(several.grammar.grammar), several.format.written(calls))
