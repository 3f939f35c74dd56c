"""Content and calls of an answer are the same however its text is cut, and nothing that is no call is lost."""

from __future__ import annotations

import json
import random

import pytest
from support.read_calls import read_calls

from aurora_lit.tool_calls.formats import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, PLAIN, ToolCall, ToolFormat
from aurora_lit.tool_calls.parser import Arguments, CallBegin, Content, ToolCallReader

FORMATS = (HERMES, MISTRAL, MISTRAL_NAMED, LLAMA3, PLAIN)
NAMES = frozenset({"f", "get_weather"})
Read = tuple[str, list[tuple[str, str]]]


def read(format_: ToolFormat, parts: list[str], *, only_one: bool = False, reads_bare: bool = False) -> Read:
    return read_calls(ToolCallReader(format_, names=NAMES, only_one=only_one, reads_bare=reads_bare), parts)


def cuts(text: str) -> list[list[str]]:
    """The text in one piece, by characters, and cut at random places."""
    shuffled, ways = random.Random(len(text)), [[text], list(text)]
    for _ in range(20):
        places = sorted(shuffled.sample(range(len(text) + 1), k=min(4, len(text))))
        ways.append([text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)])
    return ways


def read_any_way(format_: ToolFormat, text: str, *, reads_bare: bool = False) -> Read:
    results = [read(format_, parts, reads_bare=reads_bare) for parts in cuts(text)]
    assert all(result == results[0] for result in results), "how the text is cut must not matter"
    return results[0]


@pytest.mark.parametrize("format_", FORMATS, ids=lambda each: each.name)
def test_calls_are_read_as_they_are_written(format_: ToolFormat) -> None:
    arguments = [
        json.dumps(each) for each in ({}, {"a": '}"{\\', "b": [{"c": None}]}, {"é": "\n<tool_call>[TOOL_CALLS]"})
    ]
    calls = [ToolCall("f" if at % 2 else "get_weather", text) for at, text in enumerate(arguments)]
    for number in (1, 2, 3):
        assert read_any_way(format_, format_.written(calls[:number])) == ("", [tuple(call) for call in calls[:number]])


@pytest.mark.parametrize("format_", FORMATS, ids=lambda each: each.name)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "Plain text.",
        "a < b, [x] and {y} <tool",
        '{"x": {"name": "f", "arguments": {}}}',
        '[1, {"a": 2}]',
        '{"name": "unknown", "arguments": {}}',
        '{"name": "f", "arguments": 3}',
        '{"name": "f", "argum',
        '{"name": broken}',
        "[TOOL_CALLS]unknown[ARGS]{}",
        "[TOOL_CALLS]unknown[CALL_ID]f[ARGS]{}",
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call> and more',
        '<tool_call>{"f": 1}',
        "<tool_call>",
        "[TOOL_CALLS] [{]",
        '{"id": ' + 3000 * "[" + 3000 * "]" + "}",
    ],
)
def test_what_is_no_call_is_content(format_: ToolFormat, text: str) -> None:
    assert read_any_way(format_, text) == (text, [])


@pytest.mark.parametrize(
    ("format_", "text", "content", "calls"),
    [
        (
            HERMES,
            'Let me see.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
            "Let me see.",
            [("f", "{}")],
        ),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}}</tool_call>\nDone.', "\nDone.", [("f", "{}")]),
        (HERMES, '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>', "", [("f", "{}")]),
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "no"}</tool_call>',
            '<tool_call>{"name": "no"}</tool_call>',
            [("f", "{}")],
        ),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "', "", [("f", '{"a": "')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}\n</tool_call>\nDone.', "\nDone.", [("f", "{}")]),
        (
            HERMES,
            '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>\n<tool_call>{"name": "f", "arguments": {}',
            "",
            [("f", '{"a": 1}'), ("f", "{}")],
        ),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}, "id": "x', "", [("f", "{}")]),
        (PLAIN, '{"name": "f", "arguments": {} That is all.', " That is all.", [("f", "{}")]),
        (MISTRAL, 'Yes.[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "Yes.", [("f", '{"a": 1}')]),
        (MISTRAL_NAMED, 'Yes.[TOOL_CALLS]f[ARGS] {"a": 1}', "Yes.", [("f", '{"a": 1}')]),
        (
            MISTRAL_NAMED,
            '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}[TOOL_CALLS]get_weather[CALL_ID]a2B[ARGS]{}',
            "",
            [("f", '{"a": 1}'), ("get_weather", "{}")],
        ),
        (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        (PLAIN, '\n{"arguments": {"a": 1}, "name": "f"}', "", [("f", '{"a": 1}')]),
        (PLAIN, '{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [("f", '{"a": 1}')]),
        (PLAIN, '{"name": "f"}', "", [("f", "{}")]),
        (PLAIN, '{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
        (PLAIN, '{"name": "f", "arguments": {}, "id": "}"}\n\n', "", [("f", "{}")]),
        (PLAIN, '{"name": "f", "arguments": {}} as you see', " as you see", [("f", "{}")]),
        (PLAIN, '{"name": "f", "arguments": {}}, as you see', ", as you see", [("f", "{}")]),
        (PLAIN, '[{"name": "f", "arguments": {}}] [see]', " [see]", [("f", "{}")]),
        (PLAIN, '[{"name": "f", "arguments": {}},\n{"name": "f"}], [1]', ", [1]", [("f", "{}"), ("f", "{}")]),
        (PLAIN, '{"name": "f", "arguments": {}}]: so', "]: so", [("f", "{}")]),
        (LLAMA3, '{"name": "f", "parameters": {}}; {"x": 1}', '; {"x": 1}', [("f", "{}")]),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>[1] says', "[1] says", [("f", "{}")]),
        (HERMES, '<tool_call>[{"name": "f"}]</tool_call>, then', ", then", [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f"}]</tool_call>\n], then', "\n], then", [("f", "{}")]),
        (MISTRAL, '[TOOL_CALLS][{"name": "f"}, {"name": "f"}] [1] says', " [1] says", [("f", "{}"), ("f", "{}")]),
        (PLAIN, '{"name": "f", "arguments": null}', "", [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f", "parameters": null}</tool_call>', "", [("f", "{}")]),
    ],
)
def test_answers_as_models_give_them(
    format_: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert read_any_way(format_, text) == (content, calls)


BARE = '{"name": "f", "arguments": {"a": 1}}'
LONG = '{\n  "name": "get_weather",\n  "arguments": {\n    "city": "`Rome`"\n  }\n}'
ROME = '{\n    "city": "`Rome`"\n  }'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (BARE, "", [("f", '{"a": 1}')]),
        (f"```json\n{LONG}\n```", "", [("get_weather", ROME)]),
        (f"Let me see:\n\n  ```\n  {BARE}\n```\nDone.", "Let me see:\nDone.", [("f", '{"a": 1}')]),
        (f"```json\n{LONG}\n```\n\n```json\n{BARE}\n```", "", [("get_weather", ROME), ("f", '{"a": 1}')]),
        (f"{BARE}\n{BARE}\n", "", [("f", '{"a": 1}')] * 2),
        (f"```json\n[{BARE},\n {LONG}]\n```", "", [("f", '{"a": 1}'), ("get_weather", ROME)]),
        (f'{BARE}\n\n<tool_call>\n{{"name": "f"}}\n</tool_call>', "", [("f", '{"a": 1}'), ("f", "{}")]),
        (f"<tool_call>{BARE}</tool_call>\n```json\n{BARE}\n```", "", [("f", '{"a": 1}')] * 2),
        (f"{BARE[:-1]}", "", [("f", '{"a": 1}')]),
        (f"```json\n{BARE[:-1]}\n```", "", [("f", '{"a": 1}')]),
        (f"{BARE}\n```python\nf(1)\n```", "\n```python\nf(1)\n```", [("f", '{"a": 1}')]),
    ],
)
def test_calls_without_the_marker_are_read_where_the_answer_is_free(
    text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert read_any_way(HERMES, text, reads_bare=True) == (content, calls)
    assert len(read_any_way(HERMES, text)[1]) == text.count("<tool_call>")


@pytest.mark.parametrize(
    "text",
    [
        *("```json\n{}\n```", "```python\nx = {1: 2}\n```", "[1, {}] {", "{\n  int x;\n}\n", "``", "```", "``` \n ```"),
        *(f"Such as {BARE}", f"`{BARE}`", f'{{"call": {BARE}}}', f" {BARE}", "[\n\n{", "```json\n[]\n```\n\n"),
        *('{"name": "f"}', '{"name": "f", "arguments": "{}"}', '{"name": "f", "arguments": null}'),
        *('{"name": "f", "parameters": {"type": "object"}}', '{"arguments": {}, "name": "f"}'),
        *('{"name": "g", "arguments": {}}', '```json\n{"name": "g", "arguments": {}}\n```', "{'name': 'f'}"),
        *('{"name": "f", "version": 1, "x": {"arguments": {}}}', '{"name": "f", "arguments": 3}', '{"name": "f", "ar'),
    ],
)
def test_without_the_marker_only_an_object_like_a_call_that_begins_a_line_is_one(text: str) -> None:
    assert read_any_way(HERMES, text, reads_bare=True) == (text, [])


def test_json_and_code_that_are_no_calls_are_not_held_back() -> None:
    """A coding model writes much of both."""
    for text in ('```json\n{"a":', '```json\n{\n  "name": "aurora",', "```c\n{\n  int", "[1, 2", "```python\nx"):
        reader = ToolCallReader(HERMES, names=NAMES, reads_bare=True)
        assert "".join(piece.text for piece in reader.push(text) if isinstance(piece, Content)) == text


def test_arguments_are_passed_on_while_they_are_written() -> None:
    reader = ToolCallReader(HERMES, names=NAMES)
    assert reader.push('<tool_call>\n{"name": "f", "argu') == []
    assert reader.push('ments": {"a') == [CallBegin(0, "f"), Arguments(0, '{"a')]
    assert reader.push('": 1}}\n</tool') == [Arguments(0, '": 1}')]
    assert reader.finish() == []


def test_of_an_answer_that_may_call_once_further_calls_are_dropped() -> None:
    calls = [ToolCall("f", '{"a": 1}'), ToolCall("get_weather", "{}")]
    assert read(HERMES, [HERMES.written(calls)], only_one=True) == ("", [("f", '{"a": 1}')])


def test_a_marker_before_every_call_is_read_however_it_is_cut() -> None:
    text = '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]\n[TOOL_CALLS][{"name": "f", "arguments": {}}]'
    assert read_any_way(MISTRAL, text) == ("", [("f", '{"a": 1}'), ("f", "{}")])


@pytest.mark.parametrize("text", ['{"name":', '{"name": "f", "arguments": {}}\n{"', '{"name": "f", "argu'])
def test_of_an_answer_that_was_to_be_calls_nothing_else_is_left(text: str) -> None:
    reader = ToolCallReader(PLAIN, names=NAMES, only_calls=True)
    pieces = [*reader.push(text), *reader.finish()]
    assert not any(isinstance(piece, Content) for piece in pieces)


def test_half_of_a_surrogate_pair_stays_escaped() -> None:
    written = r'{"arguments": {"a": "\ud83d", "b": "é"}, "name": "f"}'
    _, calls = read_any_way(PLAIN, written)
    assert calls[0][1].encode()
    assert json.loads(calls[0][1]) == json.loads(written)["arguments"]


def test_what_an_object_has_after_its_arguments_is_no_content() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}, "meta": {"b": {"c": 2}}}\n</tool_call>'
    assert read_any_way(HERMES, text) == ("", [("f", '{"a": 1}')])
