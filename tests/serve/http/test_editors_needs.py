"""What editors and agents rely on beside fields: events by token, signs of life, replaced requests, names, props."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.fake_server import FakeServer

from aurora_lit.serve.http.fim_schema import FimRequest, InfillRequest
from aurora_lit.serve.http.schema import ChatRequest, CompletionRequest, Sampling

HOLE = {"input_prefix": "abc\n", "input_suffix": "xyz", "n_predict": 8, "id_slot": 0}
SYSTEM = {"role": "system", "content": "You are a text-editing assistant.\n--- SELECTION\nx = 1\n"}
INSTRUCTION = {"role": "user", "content": "INSTRUCTION: rename x"}
CHATS_OF_LLAMA_VIM = [
    {
        "id_slot": 1,
        "messages": [SYSTEM, {"role": "user", "content": ""}],
        "samplers": [],
        "n_predict": 0,
        "stream": False,
        "cache_prompt": True,
        "response_fields": [""],
        "model": "",
    },
    {
        "id_slot": 1,
        "messages": [SYSTEM, INSTRUCTION],
        "min_p": 0.1,
        "temperature": 0.1,
        "samplers": ["min_p", "temperature"],
        "stream": True,
        "cache_prompt": True,
        "model": "",
    },
]
"""What its instructions send (commit a1c8e6e): a warm-up while they are typed, and the request."""
LIST = {"name": "ls", "description": "Lists", "parameters": {"type": "object", "properties": {}}, "strict": True}
CHATS_OF_LLAMA_VSCODE = [
    {"messages": [SYSTEM, INSTRUCTION], "stream": False, "cache_prompt": True, "temperature": 0.8, "top_p": 0.95},
    {"messages": [SYSTEM, INSTRUCTION], "stream": False, "temperature": 0.8},
    {
        "messages": [SYSTEM, INSTRUCTION],
        "stream": True,
        "max_tokens": 8,
        "tool_choice": "auto",
        "tools": [{"type": "function", "function": LIST}],
    },
]
"""Its edits, its chat and its agent (commit 3938fb3)."""


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with FakeServer(options={"fills_holes": True}) as server, httpx.Client(base_url=server.url, timeout=20) as session:
        yield session


def chunks(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def streamed(client: httpx.Client, path: str, **body: Any) -> list[Any]:
    return chunks(client.post(path, json={"stream": True, **body}))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "abcdefgh", "max_tokens": 8}),
        ("/v1/fim/completions", {"prompt": "abc\n", "suffix": "efgh", "max_tokens": 8}),
        ("/infill", HOLE),
    ],
)
def test_a_completion_has_an_event_a_token(path: str, body: dict[str, Any], client: httpx.Client) -> None:
    """The engine brings three in a round."""

    def text(chunk: Any) -> str:
        choice = chunk["choices"][0] if "choices" in chunk else {"text": chunk["content"]}
        return choice.get("text") or choice.get("delta", {}).get("content", "")

    texts = [text(chunk) for chunk in streamed(client, path, **body)]
    assert [len(each) for each in texts if each] == [1] * 8


def test_log_probabilities_and_stop_strings_are_those_of_rounds(client: httpx.Client) -> None:
    body = {"prompt": "abcdefgh", "max_tokens": 8, "logprobs": 1, "stop": ["ef"]}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]
    found = [chunk["choices"][0] for chunk in streamed(client, "/v1/completions", **body)]
    assert "".join(each["text"] for each in found) == whole["text"] == "abcd"
    assert [t for each in found for t in (each["logprobs"] or {"tokens": []})["tokens"]] == whole["logprobs"]["tokens"]
    assert [each["finish_reason"] for each in found] == [None] * (len(found) - 1) + ["stop"]


def test_a_chat_has_an_event_a_round_and_timings_at_its_end(client: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "abcdefgh"}], "max_tokens": 7}
    found = streamed(client, "/v1/chat/completions", **body)
    assert len([chunk for chunk in found if chunk["choices"][0]["delta"].get("content")]) < 7
    assert [("timings" in chunk) for chunk in found] == [False] * (len(found) - 1) + [True]
    whole = client.post("/v1/chat/completions", json=body).json()
    for timings in (found[-1]["timings"], whole["timings"]):
        assert timings["predicted_n"] == 7
        assert timings["prompt_n"] == whole["usage"]["prompt_tokens"]
        assert timings["prompt_ms"] > 0
    several = client.post("/v1/chat/completions", json={**body, "n": 2}).json()
    assert "timings" not in several


@pytest.mark.parametrize("body", [*CHATS_OF_LLAMA_VIM, *CHATS_OF_LLAMA_VSCODE])
def test_chats_of_llama_cpps_editors_are_answered(body: dict[str, Any], client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    if body["stream"]:
        choices = [chunk["choices"][0] for chunk in chunks(response)]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
    else:
        choices = response.json()["choices"]
        text = choices[0]["message"]["content"]
    assert choices[-1]["finish_reason"]
    assert bool(text) == (body.get("n_predict") != 0)


def test_llama_cpps_fields_mean_on_every_route_what_they_mean_in_infill(client: httpx.Client) -> None:
    def answers(path: str, **fields: Any) -> list[tuple[str, int]]:
        prompt = (
            {"messages": [{"role": "user", "content": "abc\ndef\n"}]} if "chat" in path else {"prompt": "abc\ndef\n"}
        )
        response = client.post(path, json={**prompt, **fields})
        assert response.status_code == 200, response.text
        body = response.json()
        texts = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in body["choices"]]
        return [(text, body["usage"]["completion_tokens"]) for text in texts]

    for path in ("/v1/chat/completions", "/v1/completions", "/v1/fim/completions"):
        (whole,) = answers(path, n_predict=40)
        assert whole[1] == 40
        assert answers(path, n_predict=40, max_tokens=40) == [whole], "two names of one field"
        assert answers(path, n_predict=0) == [("", 0)], "the prompt is read"
        assert answers(path, n_predict=-1)[0][1] > 40, "no limit, of completions either"
        assert len(answers(path, n_predict=2, n_cmpl=3)) == 3
        indented = answers(path, n_predict=40, n_indent=1)[0][0]
        assert whole[0].startswith(indented + "\n")
        same = answers(path, n_predict=40, id_slot=7, cache_prompt=False, t_max_prompt_ms=1, response_fields=["a"])
        assert same == [whole]


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, FimRequest, InfillRequest])
def test_samplers_that_are_not_asked_for_are_off_also_where_a_model_has_defaults(kind: type[Sampling]) -> None:
    prompts = {"prompt": "a", "messages": [INSTRUCTION], "input_prefix": "a", "input_suffix": "b"}
    own = {name: value for name, value in prompts.items() if kind.model_fields.get(name)}
    defaults = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}

    def settings(**fields: Any) -> list[float | None]:
        body = kind.model_validate({**own, "min_p": 0.1, **fields}).with_defaults(defaults)
        return [body.temperature, body.top_k, body.repetition_penalty, body.min_p]

    assert settings() == [0.7, 20, 1.1, 0.1]
    assert settings(samplers=["min_p", "temperature"]) == [0.7, 0, 1.0, 0.1]
    assert settings(samplers=["top_k", "infill"]) == [0.0, 20, 1.0, 0.0]
    assert settings(samplers=["top_k", "infill"], n_cmpl=2) == [0.7, 20, 1.0, 0.0]


def test_a_newer_request_for_a_hole_replaces_one_that_waits() -> None:
    options = {"fills_holes": True, "round_s": 0.05, "max_batch_size": 1}
    with FakeServer(options=options) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        answers: dict[str, httpx.Response] = {}

        def ask(name: str, **fields: Any) -> threading.Thread:
            def post() -> None:
                answers[name] = client.post("/infill", json={**HOLE, **fields})

            thread = threading.Thread(target=post)
            thread.start()
            time.sleep(0.1)
            return thread

        threads = [
            ask("runs", n_predict=60),
            ask("other file", input_prefix="other"),
            ask("no slot", id_slot=-1),
            ask("older"),
            ask("newer", input_prefix="abc\n  d"),
            ask("warm-up", n_predict=0),
        ]
        for thread in threads:
            thread.join()
        assert {name: response.status_code for name, response in answers.items()} == {
            name: 409 if name == "older" else 200 for name in answers
        }
        error = answers["older"].json()["error"]
        assert (error["code"], error["param"]) == ("replaced", "id_slot")
        assert answers["runs"].json()["tokens_predicted"] == 60, "one that has begun goes on"
        deadline = time.monotonic() + 5
        while client.get("/v1/aurora/status").json()["queue"]["in_flight"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nowhere", "/v1/completions"])
def test_every_response_has_the_name_that_its_request_brought(path: str, client: httpx.Client) -> None:
    assert client.get(path, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize("given", [None, "", "with space", "x" * 129, "\xe4"])
def test_a_request_without_a_usable_name_gets_one(given: str | None, client: httpx.Client) -> None:
    headers = {} if given is None else {"x-request-id": given.encode("latin-1")}
    names = [client.get("/health", headers=headers).headers["x-request-id"] for _ in range(2)]  # type: ignore[arg-type]
    assert names[0] != names[1]
    assert all(len(name) == 32 for name in names)


def test_the_log_names_the_request_that_failed() -> None:
    with FakeServer() as server, httpx.Client(base_url=server.url, timeout=20) as client:
        body = {"prompt": "a<|error|>", "max_tokens": 4}
        response = client.post("/v1/completions", json=body, headers={"x-request-id": "broken-7"})
        assert response.status_code == 500
        assert "[request broken-7]" in server.stderr
