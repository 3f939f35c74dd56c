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

HOLE = {"input_prefix": "abc", "input_suffix": "xyz", "n_predict": 8, "id_slot": 0}


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
        ("/v1/fim/completions", {"prompt": "abcd", "suffix": "efgh", "max_tokens": 8}),
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
