"""Structured outputs over HTTP from a real engine on a tiny model, in every form of the API."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.tiny_models import VOCAB
from support.tiny_server import MODEL, TinyServers

END = VOCAB - 1
PATTERN = "A[BC]{2,4}D"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyServers]:
    with TinyServers(tmp_path_factory.mktemp("s"), eos_token_id=END) as running:
        running.start("learn.enabled=false")
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
