"""Structured outputs and tools over HTTP from a real engine on a tiny model, in every form of the API."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.tiny_server import MODEL, TinyServers

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    "{% if tools %}{{ tools|length }}<tool_call>{% endif %}"
)
VOCAB = 97
END = VOCAB - 1
PATTERN = "A[BC]{2,4}D"


def tool(name: str, values: list[Any], **more: Any) -> dict[str, Any]:
    """A function of one argument with few values, since the model writes at random."""
    schema = {"type": "object", "properties": {"a": {"enum": values}}, "required": ["a"]}
    return {"type": "function", "function": {"name": name, "parameters": schema, **more}}


UNUSABLE: Any = {"type": "function", "function": {"name": "u", "parameters": {"properties": {"a": {"type": "numbr"}}}}}
TOOLS = [tool("f", [1, 23]), tool("g", ["x", "}"])]
VALUES = {"f": [1, 23], "g": ["x", "}"]}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServers]:
    folder = tmp_path_factory.mktemp("s")
    with TinyServers(folder, chat_template=TEMPLATE, vocab_size=VOCAB, eos_token_id=END) as running:
        running.start("learn.enabled=false", "engine.max_seq_len=256")
        running.wait_ready()
        yield running


def ask(servers: TinyServers, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": [7, 8, 9], "max_tokens": 24, **fields}
    return httpx.post(f"{servers.url}/v1/completions", json=body, timeout=60)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": PATTERN}}, PATTERN),
        ({"guided_regex": PATTERN}, PATTERN),
        ({"structured_outputs": {"choice": ["ABBC", "CAB"]}}, "ABBC|CAB"),
        ({"guided_choice": ["ABBC", "CAB"]}, "ABBC|CAB"),
        ({"structured_outputs": {"grammar": 'start: x x\nx: "A" | "BC"'}}, "(A|BC){2}"),
        ({"guided_grammar": 'root ::= "A" x\nx ::= [0-9] [0-9]'}, "A[0-9]{2}"),
        ({"structured_outputs": {"json": {"enum": ["ABC", 7]}}}, '"ABC"|7'),
        ({"guided_json": '{"enum": ["ABC", 7]}'}, '"ABC"|7'),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [12, None]}}}}, "12|null"),
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_every_form_gives_what_it_asks_for(
    servers: TinyServers, fields: dict[str, Any], pattern: str, temperature: int
) -> None:
    answer = ask(servers, temperature=temperature, n=1 + 3 * temperature, **fields).json()
    for choice in answer["choices"]:
        assert re.fullmatch(pattern, choice["text"]), choice
        assert choice["finish_reason"] == "stop"


def test_streamed_and_whole_are_the_same_and_speculation_changes_nothing(servers: TinyServers) -> None:
    how = {"structured_outputs": {"regex": PATTERN}, "seed": 5}
    whole = ask(servers, **how).json()["choices"][0]["text"]
    assert ask(servers, speculate=False, **how).json()["choices"][0]["text"] == whole
    lines = [line[6:] for line in ask(servers, stream=True, **how).text.splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == whole


def test_a_stop_string_may_end_an_answer_before_its_grammar_does(servers: TinyServers) -> None:
    choice = ask(servers, structured_outputs={"regex": PATTERN}, stop=["D"]).json()["choices"][0]
    assert re.fullmatch(PATTERN, choice["text"] + "D")
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("guided_regex", "äöü"),  # the vocabulary cannot spell it
        ("guided_json", {"$ref": "#"}),
        ("guided_grammar", "start: start"),
    ],
)
def test_a_grammar_that_no_answer_can_follow_is_refused_and_the_server_goes_on(
    servers: TinyServers, field: str, asked: Any
) -> None:
    response = ask(servers, **{field: asked})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, field, "invalid_request_error")
    assert error["message"].startswith(f"{field} cannot be used: no answer can follow the grammar: ")
    assert ask(servers).status_code == 200


def test_as_many_choices_as_the_schema_allows_can_be_asked_for(servers: TinyServers) -> None:
    choices = [f"A{number}" for number in range(4096)]
    answer = ask(servers, structured_outputs={"choice": choices}).json()
    assert answer["choices"][0]["text"] in choices


def test_a_schema_that_cannot_be_used_is_refused_with_its_place(servers: TinyServers) -> None:
    response = ask(servers, guided_json={"properties": {"a": {"type": "strin"}}})
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "guided_json.properties.a cannot be used: Invalid type: strin",
        "type": "invalid_request_error",
        "param": "guided_json.properties.a",
        "code": "invalid_value",
    }


# -- tools ---------------------------------------------------------------------------------------------------------


def chat(servers: TinyServers, **fields: Any) -> httpx.Response:
    turn = {"role": "user", "content": "hi"}
    body = {"model": MODEL, "messages": [turn], "max_tokens": 70, "tools": TOOLS, "parallel_tool_calls": False}
    return httpx.post(f"{servers.url}/v1/chat/completions", json={**body, **fields}, timeout=60)


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    assert choice["finish_reason"] == "tool_calls", choice
    assert choice["message"]["content"] is None
    functions = [call["function"] for call in choice["message"]["tool_calls"]]
    arguments = [json.loads(function["arguments"]) for function in functions]
    assert all(each.keys() == {"a"} for each in arguments), "a function takes the arguments that it names"
    return [(function["name"], each["a"]) for function, each in zip(functions, arguments, strict=True)]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_required_call_is_valid(servers: TinyServers, temperature: int) -> None:
    answer = chat(servers, tool_choice="required", temperature=temperature, n=1 + 7 * temperature, seed=3).json()
    found = [call for choice in answer["choices"] for call in calls_of(choice)]
    assert len(found) == len(answer["choices"])
    assert all(value in VALUES[name] for name, value in found)
    if temperature:
        assert len(set(found)) > 1, "the model still chooses"
    ids = {call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]}
    assert len(ids) == len(found)


@pytest.mark.parametrize("name", ["f", "g"])
def test_a_named_function_is_called(servers: TinyServers, name: str) -> None:
    answer = chat(servers, tool_choice={"type": "function", "function": {"name": name}}, n=3, seed=1).json()
    assert {call[0] for choice in answer["choices"] for call in calls_of(choice)} == {name}


def test_several_calls_are_allowed_unless_the_request_forbids_it(servers: TinyServers) -> None:
    how = {"tool_choice": "required", "n": 8, "seed": 5, "max_tokens": 180}
    several = chat(servers, parallel_tool_calls=True, **how).json()
    assert max(len(choice["message"].get("tool_calls", ())) for choice in several["choices"]) > 1
    assert max(len(choice["message"]["tool_calls"]) for choice in chat(servers, **how).json()["choices"]) == 1


def test_streamed_calls_are_those_of_a_whole_answer_and_speculation_changes_nothing(servers: TinyServers) -> None:
    how = {"tool_choice": "required", "seed": 5, "temperature": 1}
    whole = calls_of(chat(servers, **how).json()["choices"][0])
    assert calls_of(chat(servers, speculate=False, **how).json()["choices"][0]) == whole
    lines = [line[6:] for line in chat(servers, stream=True, **how).text.splitlines() if line.startswith("data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    parts = [part for choice in choices for part in choice["delta"].get("tool_calls", ())]
    assert parts[0]["function"]["name"] == whole[0][0]
    assert all("id" not in part and "name" not in part["function"] for part in parts[1:])
    assert json.loads("".join(part["function"]["arguments"] for part in parts))["a"] == whole[0][1]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]


def test_without_a_promise_the_answer_is_the_models_own(servers: TinyServers) -> None:
    how = {"seed": 5, "temperature": 1, "messages": [{"role": "user", "content": "hi<tool_call>"}], "max_tokens": 24}
    free = chat(servers, **how).json()["choices"][0]["message"]["content"]
    none = chat(servers, tools=None, parallel_tool_calls=None, **how).json()["choices"][0]["message"]["content"]
    strict = [tool("f", [1], strict=True)]
    assert len(free) == len(none) == 24
    assert chat(servers, tools=strict, **how).status_code == 200
    assert chat(servers, tool_choice="none", **how).json()["choices"][0]["message"]["content"] == none
    assert free != none, "tools are part of the prompt"


def test_with_a_response_format_the_answer_is_of_it_or_calls(servers: TinyServers) -> None:
    schema = {"type": "object", "properties": {"b": {"enum": [7]}}, "required": ["b"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "b", "schema": schema}}
    kinds = set()
    for choice in chat(servers, response_format=form, n=16, seed=2, temperature=1).json()["choices"]:
        if choice["message"]["content"] is None:
            assert all(value in VALUES[name] for name, value in calls_of(choice))
            kinds.add("call")
        else:
            assert json.loads(choice["message"]["content"]) == {"b": 7}
            kinds.add("content")
    assert kinds == {"call", "content"}


def test_calls_and_results_are_part_of_the_next_prompt(servers: TinyServers) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "done"},
    ]
    asked = {"model": MODEL, "messages": turns, "tools": TOOLS}
    tokens = httpx.post(f"{servers.url}/tokenize", json=asked, timeout=60).json()["tokens"]
    text = httpx.post(f"{servers.url}/detokenize", json={"tokens": tokens}, timeout=60).json()["prompt"]
    assert text == "user:hiassistant:tool:done2<tool_call>"
    assert chat(servers, messages=turns, tool_choice="required").json()["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_that_promise_nothing_are_accepted(servers: TinyServers) -> None:
    for fields in (
        {"tools": [tool("f", [1], description="")], "tool_choice": "auto", "parallel_tool_calls": None},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": [UNUSABLE]},
        {"tools": [tool("f", [1], strict=True), UNUSABLE]},  # only f is promised
        {"tools": [UNUSABLE], "response_format": {"type": "json_object"}},
        {"tools": [], "tool_choice": "none"},
        {"messages": [{"role": "tool", "name": "f", "content": [{"type": "text", "text": "1"}]}]},
    ):
        assert chat(servers, max_tokens=4, **fields).status_code == 200, fields
