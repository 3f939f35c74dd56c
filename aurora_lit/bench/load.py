"""Load on a server over HTTP: sends requests from concurrent clients, records what each came to.

    bodies = [chat(text, max_tokens=64, stream=True) for text in texts]
    answers = send_all(functools.partial(ask, url), bodies, clients=4)
    answers[0].first_token_s, answers[0].pauses_s, answers[0].accepted_length

`send_all` sends so many requests, `sending` keeps clients busy until it is told to stop, and `send_at` sends at given
times. While requests run, arriving lines are only timestamped and stored; each answer is parsed when it has ended.

Leaves out servers (servers.py), what is compared, and what is made of the records.
"""

from __future__ import annotations

import http.client
import itertools
import json
import math
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import numpy as np
from scipy.stats import t as student_t

from aurora_lit.errors import AuroraError
from aurora_lit.learn.pretrain.prompts import Prompt

TIMEOUT_S = 600.0
_MOST_AT_ONCE = 64
"""Requests that run or wait together in `send_at`; later ones are late then."""
LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs of this machine. A proxy that the environment names would look for them on its own."""

T = TypeVar("T")
R = TypeVar("R")
Json = dict[str, Any]
Chat = list[dict[str, str]]
"""A request's turns."""


# -- requests ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request came to. Times are those of the monotonic clock."""

    sent_s: float
    ended_s: float
    text: str
    tokens: int
    finish_reason: str = ""
    chunks_s: tuple[float, ...] = ()
    """Of a stream: when each chunk arrived, those without text included."""
    pieces_s: tuple[float, ...] = ()
    """Of a stream: when each piece of text arrived; a piece may hold several tokens."""
    speculation: Json = field(default_factory=dict)
    """What our server says of the request's rounds (`metrics.speculative_decoding`)."""
    usage: Json = field(default_factory=dict)
    sources: Mapping[str, int] = field(default_factory=dict)
    """Number of tokens by source, if the request set `return_token_sources`."""

    @property
    def seconds(self) -> float:
        """From the request to its last byte."""
        return self.ended_s - self.sent_s

    @property
    def first_token_s(self) -> float:
        """From the request to the first piece of text of a stream."""
        return self.pieces_s[0] - self.sent_s

    @property
    def pauses_s(self) -> list[float]:
        """From one piece of text to the next."""
        return [after - before for before, after in itertools.pairwise(self.pieces_s)]

    @property
    def accepted_length(self) -> float:
        """Tokens of a round with proposals, the target's own included; 1 if there was none."""
        return float(self.speculation.get("mean_acceptance_length", 1.0))


def chat(prompt: str | Chat, **fields: Any) -> Json:
    """The body of a chat request; fields that are None are left out, and a stream gets its usage."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    given = {name: value for name, value in fields.items() if value is not None}
    more = {"stream_options": {"include_usage": True}} if fields.get("stream") else {}
    return {"messages": turns, **given, **more}


def body_of(prompt: Prompt, **fields: Any) -> Json:
    """The body of a prompt file's line: a chat, maybe with tools, or a raw text for POST /v1/completions."""
    body = chat(prompt.chat if prompt.raw is None else "", **fields)
    if prompt.raw is None:
        return {**body, **({"tools": list(prompt.tools)} if prompt.tools else {})}
    return {"prompt": prompt.raw, **{name: value for name, value in body.items() if name != "messages"}}


def exchange(
    url: str,
    path: str,
    body: Json,
    *,
    key: str | None = None,
    most_lines: int | None = None,
    timeout_s: float = TIMEOUT_S,
    source: str | None = None,
) -> tuple[int, list[tuple[float, bytes]], float]:
    """POST a body; the status, the response's lines with their times, and when it ended.

    key: the server's, if it has one. most_lines: close the connection after so many lines. timeout_s: close it after so
    many seconds without a byte, and raise TimeoutError; the server takes that for a cancelled request. source: the
    network address that it comes from; None: any.
    """
    address = None if source is None else (source, 0)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s, source_address=address)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **_authority(key)})
        response = connection.getresponse()
        lines = [(time.monotonic(), line) for line in itertools.islice(response, most_lines)]
        return response.status, lines, time.monotonic()
    finally:
        connection.close()


def ask(url: str, body: Json) -> Answer:
    """Send one request, streamed or not. Raises AuroraError if the server refuses or fails it."""
    sent_s = time.monotonic()
    status, lines, ended_s = exchange(url, f"/v1/{'chat/' if 'messages' in body else ''}completions", body)
    if status != 200:
        raise AuroraError(f"{url} answered {status}: {b''.join(line for _, line in lines)[:500]!r}")
    return read_answer(lines, sent_s=sent_s, ended_s=ended_s, streamed=bool(body.get("stream")))


def read_answer(lines: Sequence[tuple[float, bytes]], *, sent_s: float, ended_s: float, streamed: bool) -> Answer:
    """Parse the timestamped lines of a response. Raises AuroraError if it holds an error, or lacks its usage."""
    events = list(_events(lines)) if streamed else [(ended_s, json.loads(b"".join(line for _, line in lines)))]
    chunks, pieces, texts = [], [], []
    usage, reason, speculation, sources = None, "", Json(), Counter[str]()
    for stamp, event in events:
        if "error" in event:
            raise AuroraError(f"the server ended an answer with an error: {event['error']}")
        chunks.append(stamp)
        for choice in event.get("choices", ()):
            said = choice.get("delta" if streamed else "message", choice)  # a text completion has its text here
            called = json.dumps([call["function"] for call in said.get("tool_calls") or ()] or "")[1:-1]
            if text := (said.get("content") or said.get("text") or "") + called:
                pieces.append(stamp)
                texts.append(text)
            reason = choice.get("finish_reason") or reason
            sources.update(token["source"] for token in choice.get("token_sources", ()))
        usage = event.get("usage") or usage
        speculation = (event.get("metrics") or {}).get("speculative_decoding", speculation)
    if usage is None:
        raise AuroraError(f"an answer ended without its usage after {len(lines)} lines, so the request failed")
    return Answer(
        sent_s=sent_s,
        ended_s=ended_s,
        text="".join(texts),
        tokens=int(usage["completion_tokens"]),
        finish_reason=reason,
        chunks_s=tuple(chunks) if streamed else (),
        pieces_s=tuple(pieces) if streamed else (),
        speculation=speculation,
        usage=usage,
        sources=sources,
    )


def _events(lines: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, Json]]:
    for stamp, line in lines:
        if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
            yield stamp, json.loads(line[5:])


def get(url: str, path: str, *, key: str | None = None, timeout_s: float = TIMEOUT_S) -> Json:
    """The JSON at a path of the server."""
    request = urllib.request.Request(f"{url}{path}", headers=_authority(key))
    with LOOPBACK.open(request, timeout=timeout_s) as response:
        found: Json = json.load(response)
    return found


def status(url: str, *, key: str | None = None, timeout_s: float = TIMEOUT_S) -> Json:
    """What our server says of itself."""
    return get(url, "/v1/aurora/status", key=key, timeout_s=timeout_s)


def _authority(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


# -- clients -----------------------------------------------------------------------------------------------------------


def send_all(send: Callable[[T], R], items: Sequence[T], *, clients: int) -> list[R]:
    """Send every item, `clients` of them at the same time; the results in the items' order."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(send, items))


def send_at(send: Callable[[T], R], items: Iterator[T], arrivals_s: Sequence[float]) -> list[R]:
    """Send an item at each of these times after now, while others still run."""
    started, lock = time.monotonic(), threading.Lock()

    def send_one(arrives_s: float) -> R:
        time.sleep(max(0.0, started + arrives_s - time.monotonic()))
        with lock:
            item = next(items)
        return send(item)

    with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
        return list(pool.map(send_one, arrivals_s))


class Sending(Generic[R]):
    """Clients that run; see `sending`."""

    def __init__(self) -> None:
        self.answers: list[R] = []
        """In the order in which they ended."""
        self.over = threading.Event()

    def wait(self, seconds: float) -> bool:
        """Wait so long; False, at once, if a client has ended: by an error, or since no item was left."""
        return not self.over.wait(seconds)


@contextmanager
def sending(send: Callable[[T], R], items: Iterator[T], *, clients: int) -> Iterator[Sending[R]]:
    """Inside, each client sends the next item as soon as its last one is answered; at the end those that run end.

    A client's error is raised at the end.
    """
    running, lock = Sending[R](), threading.Lock()

    def client() -> None:
        try:
            while not running.over.is_set():
                with lock:
                    item = next(items)
                running.answers.append(send(item))
        except StopIteration:
            pass
        finally:
            running.over.set()

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client) for _ in range(clients)]
        try:
            yield running
        finally:
            running.over.set()
        for future in futures:
            future.result()


# -- figures -----------------------------------------------------------------------------------------------------------


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean and its 95 % interval (Student's t on the logarithms); of one ratio the bounds are NaN."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    if len(logs) < 2:
        return math.exp(mean), math.nan, math.nan
    half = float(student_t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def percentile_ms(seconds: Sequence[float], percent: float) -> float | None:
    """A percentile in milliseconds, between two of the values at most; None if there are none."""
    return 1e3 * float(np.percentile(seconds, percent)) if seconds else None
