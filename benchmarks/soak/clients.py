"""Eight clients, and the answers that they must get: those of the same server without speculation.

    pool = make_pool(seed=0, fills_holes=False)
    oracle = ask_oracle(server, pool)
    with Clients(server, pool, oracle, seed=0) as clients: ...
    clients.calls

One client each: streams, whole answers, a grammar, tools, holes (sampled answers with a seed, if the model fills none),
cancelled requests, salts with sampled answers, and canaries with `"store": false`. Each sends one request after the
other, drawn from the pool by the seed. Leaves out what the calls came to (watch.py).
"""

from __future__ import annotations

import functools
import http.client
import inspect
import itertools
import json
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from aurora_lit.bench.load import Json, exchange, read_answer, send_all
from aurora_lit.errors import AuroraError
from benchmarks import cancelled

from .canary import requests
from .server import Supervised

CALL_S = 120.0
"""A call must have ended by then."""
KINDS = ("stream", "whole", "grammar", "tools", "hole", "salt")
"""Of clients whose answers are compared."""
_EACH, _TOKENS = 12, 48
"""Requests of a kind in the pool, and tokens of an answer."""
_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_THINGS = "rivers", "primes", "clocks", "queues", "bridges", "colours", "planets", "lists", "birds", "sails", "maps"
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "number": {"type": "integer"},
        "kinds": {"type": "array", "items": {"enum": ["small", "large", "old"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "number", "kinds"],
    "additionalProperties": False,
}
_TOOL = {
    "name": "look_up",
    "description": "Looks a thing up.",
    "parameters": {
        "type": "object",
        "properties": {"thing": {"type": "string", "maxLength": 20}, "most": {"type": "integer"}},
        "required": ["thing", "most"],
        "additionalProperties": False,
    },
}


class Request(NamedTuple):
    """One of the pool."""

    kind: str
    path: str
    body: Json


class Call(NamedTuple):
    """What a request came to. Times are those of the monotonic clock."""

    client: str
    sent_s: float
    ended_s: float
    outcome: str
    """same, different (from the oracle's), cut (by the client), answered, refused (with a status), failed."""
    tokens: int = 0
    detail: str = ""


# -- the pool ----------------------------------------------------------------------------------------------------------


def make_pool(*, seed: int, fills_holes: bool) -> list[Request]:
    """Requests of all kinds, greedy or sampled with a seed."""
    draws, code = random.Random(seed), Path(inspect.__file__).read_text()
    return [_request(kind, draws, code, fills_holes) for kind in KINDS for _ in range(_EACH)]


def _request(kind: str, draws: random.Random, code: str, fills_holes: bool) -> Request:
    begin = draws.randrange(len(code) - 3000)
    text = code[begin : begin + draws.randint(100, 1500)]
    about = f"Write about {draws.choice(_THINGS)} and {draws.choice(_THINGS)}, {draws.randint(2, 99)} of each."
    greedy = {"max_tokens": _TOKENS, "temperature": 0.0}
    sampled = {"max_tokens": _TOKENS, "temperature": 0.8, "seed": draws.randrange(1 << 30)}
    chat = {"messages": [{"role": "user", "content": about}]}
    if kind == "stream":
        more = {"stream": True, "stream_options": {"include_usage": True}}
        return Request(kind, _CHAT, {**chat, **greedy, **more})
    if kind == "grammar":
        form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": _SCHEMA}}
        return Request(kind, _CHAT, {**chat, **greedy, "response_format": form})
    if kind == "tools":
        tools = {"tools": [{"type": "function", "function": _TOOL}], "tool_choice": "required"}
        return Request(kind, _CHAT, {**chat, **greedy, **tools})
    if kind == "hole" and fills_holes:
        half = len(text) // 2
        return Request(kind, _TEXT, {"prompt": text[:half], "suffix": text[half:], **greedy})
    if kind == "salt":
        return Request(kind, _CHAT, {**chat, **sampled})
    return Request(kind, _TEXT, {"prompt": text, **(greedy if kind == "whole" else sampled)})


def ask(server: Supervised, request: Request, **fields: object) -> tuple[str, int]:
    """Text and calls of the answer, and its tokens. Raises AuroraError or OSError if there is none."""
    body = {**request.body, **fields}
    sent_s = time.monotonic()
    status, lines, ended_s = exchange(server.url, request.path, body, key=server.key, timeout_s=CALL_S)
    if status != 200:
        raise Refused(f"{status}: {b''.join(line for _, line in lines)[:300]!r}")
    answer = read_answer(lines, sent_s=sent_s, ended_s=ended_s, streamed=bool(body.get("stream")))
    return f"{answer.text}\n{answer.finish_reason}", answer.tokens


class Refused(AuroraError):
    """The server answered with an error."""


def fills_holes(server: Supervised) -> bool:
    """True if the model has tokens for it."""
    body = {"prompt": "a", "suffix": "b", "max_tokens": 1}
    return exchange(server.url, _TEXT, body, key=server.key)[0] == 200


def ask_oracle(server: Supervised, pool: Sequence[Request]) -> dict[int, str]:
    """The answers without speculation, by place in the pool."""

    def send(request: Request) -> str:
        body = {name: value for name, value in request.body.items() if not name.startswith("stream")}
        return ask(server, request._replace(body=body), speculate=False, store=False)[0]

    return dict(enumerate(send_all(send, pool, clients=4)))


# -- the clients -------------------------------------------------------------------------------------------------------


class Clients:
    """Eight threads, until the end of the block; `pause` stops them after their present calls."""

    def __init__(
        self,
        server: Supervised,
        pool: Sequence[Request],
        oracle: Mapping[int, str],
        *,
        hidden: str,
        salt: str,
        seed: int,
    ) -> None:
        """hidden, salt: texts that must be found nowhere afterwards."""
        self._server, self._pool, self._oracle, self._seed = server, pool, oracle, seed
        self._hidden, self._salt = hidden, salt
        self.calls: list[Call] = []
        self.texts: list[str] = []
        """What all but the client with canaries were answered, errors included."""
        self._ends, self._may_run, self._num_running = threading.Event(), threading.Event(), 0
        self._lock = threading.Lock()
        names = (*KINDS, "cancel", "canary")
        self._threads = [threading.Thread(target=self._client, args=(name,), name=name) for name in names]

    def __enter__(self) -> Self:
        self._may_run.set()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._may_run.set()
        for thread in self._threads:
            thread.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, no call runs."""
        self._may_run.clear()
        deadline = time.monotonic() + CALL_S + 10
        while self._num_running and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            yield
        finally:
            self._may_run.set()

    def _client(self, name: str) -> None:
        calls = {"cancel": self._cancels, "canary": self._canaries}.get(name, functools.partial(self._compares, name))()
        while not self._ends.is_set():
            self._may_run.wait()
            with self._lock:
                self._num_running += 1
            began_s = time.monotonic()
            try:
                call = next(calls)
            except Exception as error:
                self.calls.append(Call(name, began_s, time.monotonic(), "failed", detail=f"client: {error!r}"))
                raise
            finally:
                with self._lock:
                    self._num_running -= 1
            self.calls.append(call)
            if call.outcome in ("failed", "refused"):
                self._ends.wait(0.5)

    def _compares(self, kind: str) -> Iterator[Call]:
        draws = random.Random(f"{self._seed} {kind}")
        mine = [(number, each) for number, each in enumerate(self._pool) if each.kind == kind]
        while True:
            number, request = draws.choice(mine)
            salt = {"cache_salt": f"{self._salt}{draws.randrange(3)}"} if kind == "salt" else {}
            yield self._call(kind, request, expected=self._oracle[number], **salt)

    def _call(self, client: str, request: Request, *, expected: str, **fields: object) -> Call:
        sent_s = time.monotonic()

        def ended(outcome: str, tokens: int = 0, detail: str = "") -> Call:
            return Call(client, sent_s, time.monotonic(), outcome, tokens, detail)

        try:
            text, tokens = ask(self._server, request, **fields)
        except Refused as error:
            self.texts.append(str(error))
            return ended("refused", detail=str(error))
        except (AuroraError, OSError, http.client.HTTPException, ValueError) as error:
            self.texts.append(str(error))
            return ended("failed", detail=f"{type(error).__name__}: {error}")
        self.texts.append(text)
        if text == expected:
            return ended("same", tokens)
        return ended("different", tokens, f"{json.dumps(request.body)} gave {text!r} in place of {expected!r}")

    def _cancels(self) -> Iterator[Call]:
        kinds = ("chat", "completion")
        for seed in itertools.count(self._seed):
            for cut in cancelled.planned(100, seed, kinds=kinds, longest=800, most_s=2.0):
                sent_s = time.monotonic()
                try:
                    end = cancelled.send_and_cut(self._server.url, cut, key=self._server.key)
                except (OSError, IndexError) as error:
                    yield Call("cancel", sent_s, time.monotonic(), "failed", detail=f"{type(error).__name__}: {error}")
                else:
                    yield Call("cancel", sent_s, time.monotonic(), "refused" if end.isdigit() else "cut", detail=end)

    def _canaries(self) -> Iterator[Call]:
        for path, body in itertools.cycle(requests(self._hidden, store=False)):
            sent_s = time.monotonic()
            try:
                status, _, _ = exchange(self._server.url, path, body, key=self._server.key, timeout_s=CALL_S)
            except (OSError, http.client.HTTPException) as error:
                yield Call("canary", sent_s, time.monotonic(), "failed", detail=f"{type(error).__name__}: {error}")
            else:
                yield Call("canary", sent_s, time.monotonic(), "answered", detail=str(status))
            time.sleep(0.2)
