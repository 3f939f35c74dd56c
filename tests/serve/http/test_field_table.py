"""docs/clients.md says what the schema of a chat request accepts, and names every field of OpenAI's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

import httpx
import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import BaseModel, ValidationError
from support import ROOT

from aurora_lit.errors import RequestError
from aurora_lit.serve.http.body import Strict
from aurora_lit.serve.http.fim_schema import FimRequest, InfillRequest
from aurora_lit.serve.http.message_fields import NEUTRAL_IN_MESSAGE, Message
from aurora_lit.serve.http.schema import NEUTRAL, ChatRequest

TURN = {"role": "user", "content": "Hello"}


def rows(section: str) -> list[list[str]]:
    """The cells of the tables of a section, without heads."""
    text = (ROOT / "docs" / "clients.md").read_text().split(f"\n## {section}\n", 1)[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(section: str) -> list[str]:
    return [name for cells in rows(section) for name in re.findall(r"`([^`]+)`", cells[0])]


def values(cell: str) -> list[Any]:
    return [json.loads(text) for text in re.findall(r"`([^`]+)`", cell)]


def refusal(**fields: Any) -> str:
    """What a request with these fields is told; "" if it is accepted."""
    try:
        ChatRequest.model_validate({"messages": [TURN], **fields})
    except (RequestError, ValidationError) as error:
        return str(error)
    return ""


def test_the_supported_fields_are_the_schemas() -> None:
    assert sorted(names("Supported")) == sorted(ChatRequest.model_fields)


def test_the_values_without_effect_are_the_schemas() -> None:
    shown_rows = rows("Accepted without effect")
    of_request, of_message = shown_rows[: len(NEUTRAL)], shown_rows[len(NEUTRAL) :]
    for table, cells_of in ((NEUTRAL, of_request), (NEUTRAL_IN_MESSAGE, of_message)):
        shown = {cells[0].strip("`"): values(cells[1]) for cells in cells_of}
        assert {name: repr(list(each)) for name, each in table.items()} == {n: repr(v) for n, v in shown.items()}


def test_values_without_effect_are_accepted_and_others_refused() -> None:
    for name, allowed in NEUTRAL.items():
        for value in allowed:
            assert refusal(**{name: value}) == ""
        assert name in refusal(**{name: "something else"})
    for at in (0, -1):
        assert Message.model_validate({**TURN, **{name: each[at] for name, each in NEUTRAL_IN_MESSAGE.items()}}).text
    with pytest.raises(RequestError, match=r"^messages\[2\].type='image' is not supported") as refused:
        ChatRequest.model_validate({"messages": [TURN, TURN, {**TURN, "type": "image"}]})
    assert refused.value.param == "messages[2].type"


class City(BaseModel):
    name: str


@pytest.mark.parametrize("calls", [False, True])
def test_answers_that_openais_client_parsed_may_come_back(calls: bool) -> None:
    bodies = list[Any]()
    function = {"name": "City", "arguments": '{"name": "Paris"}'}
    called = {"content": None, "tool_calls": [{"id": "a", "type": "function", "function": function}]}
    message = {"role": "assistant", **(called if calls else {"content": function["arguments"]})}

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        choice = {"index": 0, "finish_reason": "tool_calls" if calls else "stop", "message": message}
        head = {"id": "a", "object": "chat.completion", "created": 0, "model": "tiny"}
        return httpx.Response(200, json={**head, "choices": [choice]})

    http = httpx.Client(transport=httpx.MockTransport(answer))
    asked: Any = {"tools": [openai.pydantic_function_tool(City)]} if calls else {"response_format": City}
    with openai.OpenAI(base_url="http://test", api_key="none", http_client=http) as client:
        turns = list[Any]([TURN])
        for _ in range(2):
            turns.append(client.chat.completions.parse(model="tiny", messages=turns, **asked).choices[0].message)
    first, second = bodies[-1]["messages"]
    assert "parsed_arguments" in second["tool_calls"][0]["function"] if calls else "parsed" in second
    assert ChatRequest.model_validate(bodies[-1]).messages[-1].text == (message["content"] or "")
    assert Message.model_validate({**message, "provider_specific_fields": {"refusal": None}})


def test_refused_fields_are_refused_by_name() -> None:
    assert len(names("Refused")) > 20
    for name in names("Refused"):
        for value in (1, None):
            assert name in refusal(**{name: value}), name


def bodies(kind: type[BaseModel] = Strict) -> Iterator[type[BaseModel]]:
    """All bodies and their parts."""
    for each in kind.__subclasses__():
        yield each
        yield from bodies(each)


def test_null_is_the_default_of_every_field_that_may_be_left_out() -> None:
    fields = {f"{each.__name__}.{name}": field for each in bodies() for name, field in each.model_fields.items()}
    assert "StreamOptions.include_usage" in fields
    assert [name for name, field in fields.items() if not field.is_required() and field.default is not None] == []
    assert refusal(stream=True, stream_options={"include_usage": None, "continuous_usage_stats": None}) == ""
    call = {"id": "a", "type": None, "function": {"name": "f", "arguments": "{}"}}
    assert refusal(messages=[{"role": "assistant", "tool_calls": [call]}]) == ""


def test_the_own_fields_of_the_routes_that_fill_holes_are_described() -> None:
    text = (ROOT / "docs" / "editors.md").read_text()
    for kind, section in ((InfillRequest, "POST /infill"), (FimRequest, "POST /v1/fim/completions")):
        shown = re.findall(r"`(\w+)`", text.split(f"\n## {section}\n")[1].split("\n## ")[0])
        assert kind.model_fields.keys() - ChatRequest.model_fields.keys() - {*shown} == set()


def test_every_field_of_openais_package_has_a_row() -> None:
    shown = {*names("Supported"), *names("Accepted without effect"), *names("Refused")}
    assert get_type_hints(CompletionCreateParamsNonStreaming).keys() - shown == set()


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("temperature", 2, 2.1),
        ("top_k", -1, -2),
        ("n", 128, 129),
        ("repetition_penalty", 0.01, 0.0),
        ("top_p", 1, 0),
        ("logit_bias", {str(token): 1.0 for token in range(1024)}, {str(token): 1.0 for token in range(1025)}),
        ("stop_token_ids", [1] * 1024, [1] * 1025),
        ("metadata", {str(number): "a" for number in range(16)}, {str(number): "a" for number in range(17)}),
    ],
)
def test_ranges_are_as_the_table_says(name: str, inside: Any, outside: Any) -> None:
    assert refusal(**{name: inside}) == ""
    assert name in refusal(**{name: outside})
