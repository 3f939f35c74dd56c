"""Which format a chat template teaches, and how tools reach a model whose template has none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aurora_lit.tool_calls.formats import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, PLAIN, ToolFormat, format_of
from aurora_lit.tool_calls.formats import without_template as plain_turns

TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", PLAIN),
        ("{% for m in messages %}<tool_call>{% endfor %}", PLAIN),
        ("{% if tools %}<tools>{{ tools|tojson }}</tools> answer in <tool_call>{% endif %}", HERMES),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS] [{{ calls }}]", MISTRAL),
        ("{% if tools %}{% endif %}[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}", MISTRAL_NAMED),
        ("{% if tools %}{% endif %}<|python_tag|>", LLAMA3),
        ("{% if tools %}{% endif %}{{ '\"parameters\": ' }}", LLAMA3),
    ],
)
def test_the_template_tells_the_format(template: str, expected: ToolFormat) -> None:
    assert format_of(template) == expected


def test_an_unknown_format_is_read_as_plain_json_and_the_template_shows_the_tools() -> None:
    format_ = format_of("{% if tools %}<functions>{{ tools }}</functions>{% endif %}")
    assert (format_.name, format_.is_in_template) == ("plain", True)


@pytest.mark.parametrize(
    ("template", "name", "form"),
    [
        ("<tool_call>\n<function={{ call.name }}>", "hermes", "<function="),
        ("<tool_call>{{ call.name }}\n<arg_key>", "hermes", "<arg_key>"),
        ("{{- '<minimax:tool_call>' }}<invoke name=\"tool-name-1\">", "plain", "<invoke name="),
        ("{{- '<function=' + call.name + '>' + call.parameters }}{{ '\"parameters\": ' }}", "llama3", "<function="),
        (
            "{{- '<|start|>assistant to=' }}{{- 'functions.' + call.name + '<|channel|>commentary ' }}",
            "plain",
            "<|channel|>commentary",
        ),
        ("{{- '<|start|>assistant to=functions.' + call.name }}", "plain", "to=functions"),
        ("{{- '<|tool_call>call:' + function['name'] + '{' -}}", "plain", "<|tool_call>call:"),
        ("'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>'", "plain", "<｜tool▁call▁begin｜>"),
        ("<|tool_calls_section_begin|><|tool_call_begin|>{{ id }}", "plain", "<|tool_call_begin|>"),
        ('{{- "<|tool_call_start|>[" + calls + "]<|tool_call_end|>" -}}', "plain", "<|tool_call_start|>"),
        ("{{- '<TOOLCALL>[' + calls + ']</TOOLCALL>' -}}", "plain", "<TOOLCALL>"),
        ("{{- '\\n<tool_calls>[' + calls + ']</tool_calls>' -}}", "plain", "<tool_calls>"),
        ("<|START_ACTION|>[{{ calls }}]<|END_ACTION|>", "plain", "<|START_ACTION|>"),
    ],
)
def test_a_form_that_is_not_read_is_told_whatever_else_the_template_has(template: str, name: str, form: str) -> None:
    """The templates are those of Qwen3-Coder, GLM-4.5, MiniMax-M2, gpt-oss, Gemma 4, DeepSeek-V3, Kimi-K2, LFM2,
    Nemotron, Apriel and Command A.
    """
    found = format_of("{% if tools %}{{ tools }}{% endif %}" + template)
    assert (found.name, found.unread_form, found.is_in_template) == (name, form, True)
    assert format_of(template).unread_form == "", "of a template that shows no tools: ours are told in words"


def test_ids_are_those_that_the_template_takes() -> None:
    assert {len(MISTRAL.new_id()) for _ in range(20)} == {9}
    assert HERMES.new_id().startswith("call_")
    assert HERMES.new_id() != HERMES.new_id()


def test_a_template_without_tools_sees_plain_turns_only() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    other = {"id": "b", "type": "function", "function": {"name": "weather", "arguments": {}}}
    turns = plain_turns(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Is it warm?"},
            {"role": "assistant", "content": "", "tool_calls": [call, other]},
            {"role": "tool", "content": "21", "tool_call_id": "a", "name": "weather"},
            {"role": "tool", "content": "no city", "tool_call_id": "b", "name": ""},
            {"role": "assistant", "content": "One moment.", "tool_calls": [call]},
            {"role": "tool", "content": "22", "tool_call_id": "a", "name": "weather"},
        ],
        TOOLS,
    )
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert turns[0]["content"].startswith("Be kind.\n\n")
    assert json.dumps(TOOLS[0]["function"]) in turns[0]["content"]
    assert turns[2]["content"].splitlines() == [
        '{"name": "weather", "arguments": {"city": "Rome"}}',
        '{"name": "weather", "arguments": {}}',
    ]
    assert turns[3]["content"] == "Result of weather: 21\nResult of the function: no city"
    assert turns[4]["content"].startswith("One moment.\n{")


def test_tools_make_a_system_turn_where_there_is_none() -> None:
    (system, user) = plain_turns([{"role": "user", "content": "Hello"}], TOOLS)
    assert system["role"] == "system"
    assert "weather" in system["content"]
    assert user == {"role": "user", "content": "Hello"}
    assert plain_turns([user], []) == [user]


def test_a_turns_name_reaches_the_template_but_that_of_a_result_is_text() -> None:
    turns = plain_turns(
        [
            {"role": "user", "content": "Is it warm?", "name": "ann"},
            {"role": "assistant", "content": "One moment."},
            {"role": "tool", "content": "21", "tool_call_id": "a", "name": "weather"},
        ],
        [],
    )
    assert turns[0] == {"role": "user", "content": "Is it warm?", "name": "ann"}
    assert turns[2] == {"role": "user", "content": "Result of weather: 21"}
