"""Concurrent clients: each sends its next request when it has read its last answer to the end.

Leaves out the servers (servers.py) and the report (report.py). While requests run, arriving lines are only timestamped
and stored; they are parsed afterwards, so that the client takes little of the processor that it measures.
"""

from __future__ import annotations

import http.client
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from aurora_lit.bench.server_process import LOOPBACK
from aurora_lit.errors import AuroraError

_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One streamed answer as its client saw it; times are those of the monotonic clock."""

    sent_s: float
    pieces_s: tuple[float, ...]
    """When each piece of text arrived; a piece may hold several tokens."""
    ended_s: float
    tokens: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Load:
    """What concurrent clients observed together."""

    tokens_per_s: float
    """From the first request to the end of the last answer, so the reading of prompts is included."""
    first_token_s: float
    """From the request to the first piece of text, median."""
    token_s: float
    """Time per token from the first piece to the last; median over answers."""
    pause_p50_s: float
    """Between one piece of text and the next, median."""
    pause_p99_s: float
    tokens: int
    texts: list[str]
    """In the prompts' order."""


def run_load(
    port: int,
    prompts: Sequence[str],
    *,
    clients: int,
    max_tokens: int,
    temperature: float = 0.0,
    on_answer: Callable[[], object] = lambda: None,
) -> Load:
    """Send every prompt from `clients` concurrent clients; at temperature 0 greedily."""
    model = served_model(port)

    def send(prompt: str) -> Answer:
        answer = ask(port, model, prompt, max_tokens=max_tokens, temperature=temperature)
        on_answer()
        return answer

    with ThreadPoolExecutor(clients) as pool:
        return summarise(list(pool.map(send, prompts)))


def served_model(port: int) -> str:
    """The name of the server's model."""
    with LOOPBACK.open(f"http://127.0.0.1:{port}/v1/models", timeout=_TIMEOUT_S) as response:
        return str(json.load(response)["data"][0]["id"])


def ask(port: int, model: str, prompt: str, *, max_tokens: int, temperature: float = 0.0) -> Answer:
    """One streamed answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        sent = time.monotonic()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise AuroraError(f"the server answered {response.status}: {response.read(500)!r}")
        lines = [(time.monotonic(), line) for line in response]
        ended = time.monotonic()
    finally:
        connection.close()
    return read_answer(lines, sent_s=sent, ended_s=ended)


def read_answer(lines: Sequence[tuple[float, bytes]], *, sent_s: float, ended_s: float) -> Answer:
    """Parse the timestamped lines of an event stream."""
    pieces, texts, tokens = [], [], None
    for stamp, event in _events(lines):
        if "error" in event:
            raise AuroraError(f"the server ended an answer with an error: {event['error']}")
        text = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
        if text:
            pieces.append(stamp)
            texts.append(text)
        if event.get("usage"):
            tokens = int(event["usage"]["completion_tokens"])
    if tokens is None or not pieces:
        raise AuroraError(f"an answer without {'usage' if pieces else 'text'} in its stream of {len(lines)} lines")
    return Answer(sent_s=sent_s, pieces_s=tuple(pieces), ended_s=ended_s, tokens=tokens, text="".join(texts))


def _events(lines: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    for stamp, line in lines:
        if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
            yield stamp, json.loads(line[5:])


def summarise(answers: Sequence[Answer]) -> Load:
    """The report on answers that were requested together."""
    pauses = [after - before for a in answers for before, after in zip(a.pieces_s, a.pieces_s[1:], strict=False)]
    if not pauses:
        raise AuroraError("no answer arrived in several pieces, so there is nothing to time; raise --max-tokens")
    cuts = statistics.quantiles(pauses, n=100, method="inclusive") if len(pauses) > 1 else pauses * 99
    tokens = sum(answer.tokens for answer in answers)
    return Load(
        tokens_per_s=tokens / (max(a.ended_s for a in answers) - min(a.sent_s for a in answers)),
        first_token_s=statistics.median(a.pieces_s[0] - a.sent_s for a in answers),
        token_s=statistics.median((a.pieces_s[-1] - a.pieces_s[0]) / max(1, a.tokens - 1) for a in answers),
        pause_p50_s=cuts[49],
        pause_p99_s=cuts[98],
        tokens=tokens,
        texts=[answer.text for answer in answers],
    )
