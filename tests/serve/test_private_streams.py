"""Streams on a clock and filled chunks, through a whole server: what an eavesdropper sees, and what a client gets."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from support.fake_server import MODEL, FakeServer, post_and_do_not_read

INTERVAL_S = 0.2
PADDING = 512
TEXT = "hello 今日は 🌍, ça va? "


class Message(NamedTuple):
    """One HTTP chunk, which is what an eavesdropper sees of a stream."""

    after_s: float
    content: bytes


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    """Three tokens each 10 ms."""
    settings = {"stream_interval_ms": 1000 * INTERVAL_S, "stream_padding": PADDING}
    with FakeServer(server=settings, options={"round_s": 0.01}) as running:
        yield running


def body(path: str, text: str, **fields: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    return {"model": MODEL, "stream": True, **prompt, **fields}


def messages(server: FakeServer, path: str, content: dict[str, Any]) -> list[Message]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    began_s = time.monotonic()
    connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    found = []
    while content_of := response.read1(1 << 20):
        found.append(Message(time.monotonic() - began_s, content_of))
    connection.close()
    return found


def events(found: list[Message]) -> list[bytes]:
    """The JSON of each event, without [DONE]."""
    lines = b"".join(message.content for message in found).split(b"\n\n")
    assert lines[-2:] == [b"data: [DONE]", b""]
    return [line.removeprefix(b"data: ") for line in lines[:-2]]


CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETION])


@PATHS
def test_messages_leave_on_the_clock_however_many_rounds_there_are(server: FakeServer, path: str) -> None:
    """240 tokens are 80 rounds, which take at least 0.8 s."""
    found = messages(server, path, body(path, TEXT, max_tokens=240))
    assert 4 <= len(found) <= 40
    assert len(found) <= found[-1].after_s / INTERVAL_S + 1
    gaps_s = [later.after_s - sooner.after_s for sooner, later in zip(found, found[1:], strict=False)]
    assert min(gaps_s) > INTERVAL_S / 2
    assert found[0].after_s > INTERVAL_S * 0.9, "the first token waits too"


@PATHS
def test_every_chunk_has_a_multiple_of_the_size(server: FakeServer, path: str) -> None:
    options = {"include_usage": True}
    found = events(messages(server, path, body(path, TEXT, max_tokens=60, stream_options=options)))
    assert {len(content) % PADDING for content in found} == {0}
    assert all(json.loads(content)["obfuscation"] for content in found)


@PATHS
def test_a_request_can_do_without_the_filling(server: FakeServer, path: str) -> None:
    options = {"include_obfuscation": False}
    found = events(messages(server, path, body(path, "abc", max_tokens=9, stream_options=options)))
    assert not any("obfuscation" in json.loads(content) for content in found)


@PATHS
@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (TEXT, {"max_tokens": 100}),
        (TEXT, {"max_tokens": 100, "stop": ["🌍, ça va? hello"]}),
        ("ab<|end|>", {"max_tokens": 40, "n": 2}),
    ],
)
def test_the_answer_is_the_one_without_a_stream(
    server: FakeServer, path: str, text: str, fields: dict[str, Any]
) -> None:
    content = body(path, text, **fields)
    whole = httpx.post(server.url + path, json={**content, "stream": False}, timeout=20).json()
    content["stream_options"] = {"include_usage": True}
    *chunks, last = [json.loads(event) for event in events(messages(server, path, content))]
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        texts = [part["text"] if "text" in part else part["delta"].get("content", "") for part in own]
        assert "".join(texts) == choice.get("text", choice.get("message", {}).get("content"))
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
    assert (last["choices"], last["usage"], last["metrics"]) == ([], whole["usage"], whole["metrics"])


def test_the_openai_client_ignores_the_filling(server: FakeServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello world"}],
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True, "include_obfuscation": True},
        )
        chunks = list(stream)
        pieces = list(client.completions.create(model=MODEL, prompt="hello world", max_tokens=40, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text.startswith("hello world")
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 40
    assert "".join(piece.choices[0].text for piece in pieces) == "hello world" * 20
    for part in [*chunks, *pieces]:  # a field of chat chunks; completions keep it among unknown ones
        assert isinstance(getattr(part, "obfuscation", None), str)


@pytest.mark.process
def test_a_worker_that_dies_ends_the_stream_with_what_was_ready_and_an_error() -> None:
    with FakeServer(server={"stream_interval_ms": 300.0}, options={"round_s": 0.01}) as server:
        found = messages(server, COMPLETION, body(COMPLETION, "abc<|crash|>", max_tokens=100))
    *parts, error, nothing = b"".join(message.content for message in found).split(b"\n\n")
    assert nothing == b""
    assert b"".join(parts).count(b'"text":"abc"') == 1
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"]


@pytest.mark.parametrize("interval_ms", [100.0, 10_000.0])
def test_a_client_that_leaves_frees_its_slot_within_a_second(interval_ms: float) -> None:
    """In the middle of its stream, and while its first message waits for the clock."""
    settings, options = {"stream_interval_ms": interval_ms}, {"round_s": 0.03, "max_seq_len": 4096}
    with FakeServer(server=settings, options=options) as server:  # nor does it delay the server's end
        connection = post_and_do_not_read(server.port, body(COMPLETION, "abc", max_tokens=3000))
        server.wait_until(lambda now: now["tokens"]["generated"] > 20, 5)
        connection.close()
        assert server.wait_until(lambda now: not (now["queue"]["running"] or now["queue"]["calls"]), 5) < 1
        began_s = time.monotonic()
        assert server.end()[0] == 0
        assert time.monotonic() - began_s < 5
