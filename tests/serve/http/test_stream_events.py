"""Chunks as events: filled to a multiple of a size whatever they hold; sent at the ends of intervals only."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from aurora_lit.serve.http import stream_events
from aurora_lit.serve.http.schema import StreamOptions
from aurora_lit.serve.http.stream_events import OBFUSCATION_BYTES, EventStream, SendClock, StreamShape, event

TEXTS = [
    "",
    "a",
    "today 今日は 🌍",
    '"quoted" \\ and\nbroken',
    "a\x85b\u2028c\u2029d\x7f\x1c\x0b",
    *("x" * length for length in range(200, 300, 7)),
]


def chunk(text: str) -> dict[str, Any]:
    return {"id": "chatcmpl-0", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def json_of(sent: str) -> str:
    assert sent.startswith("data: ")
    assert sent.endswith("\n\n")
    assert len(sent.splitlines()) == 2, "an event is one line, and an empty one"
    return sent.removeprefix("data: ").removesuffix("\n\n")


def test_a_filled_chunk_has_a_multiple_of_the_size_and_the_same_content() -> None:
    for text, padding_bytes in itertools.product(TEXTS, [1, 2, 7, 64, 256, 1000]):
        sent = json_of(event(chunk(text), padding_bytes=padding_bytes))
        content = json.loads(sent)
        filling = content.pop("obfuscation")
        assert content == chunk(text)
        assert len(sent.encode()) % padding_bytes == 0
        assert len(filling) < padding_bytes, "up to the next multiple, and no further"
        assert filling.isascii()


def test_texts_of_different_lengths_have_one_size() -> None:
    sizes = {len(event(chunk("x" * length), padding_bytes=256)) for length in range(100)}
    assert sizes == {len("data: \n\n") + 256}
    assert len({len(event(chunk("x" * length))) for length in range(100)}) == 100


def test_the_filling_is_random() -> None:
    fillings = {json.loads(json_of(event(chunk(""), padding_bytes=256)))["obfuscation"] for _ in range(20)}
    assert len(fillings) == 20


def test_without_padding_there_is_no_field() -> None:
    for text in TEXTS:
        assert json.loads(json_of(event(chunk(text)))) == chunk(text)


@pytest.mark.parametrize(
    ("setting", "asked", "padding_bytes"),
    [(0, None, 0), (0, False, 0), (0, True, OBFUSCATION_BYTES), (64, None, 64), (64, False, 0), (64, True, 64)],
)
def test_a_request_can_ask_for_padding_and_do_without(setting: int, asked: bool | None, padding_bytes: int) -> None:
    options = StreamOptions(include_obfuscation=asked)
    assert StreamShape(padding_bytes=setting).padding_for(options) == padding_bytes


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time, which passes only where a test says so."""
    time = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(stream_events, "time", SimpleNamespace(monotonic=lambda: time.now_s))
    return time


@pytest.mark.parametrize("early_s", [0.0, 1e-6])
def test_sending_is_possible_at_the_ends_of_intervals_only_and_once_at_each(
    now: SimpleNamespace, early_s: float
) -> None:
    """early_s: timers may end a little too early."""
    rng = random.Random(0)
    clock, in_intervals = SendClock(0.1), []
    for _ in range(200):
        now.now_s += rng.choice([0.0, 0.001, 0.03, 0.0999, 0.1, 0.25])
        now.now_s += max(0.0, clock.wait_s() - early_s)
        in_intervals.append((now.now_s - 1000.0) / 0.1)
    assert all(abs(at - round(at)) < 1e-4 for at in in_intervals)
    ends = [round(at) for at in in_intervals]
    assert ends[0] >= 1, "the first message waits too"
    assert len(set(ends)) == len(ends)
    assert max(later - earlier for earlier, later in zip(ends, ends[1:], strict=False)) <= 3, "no end is left out"


def test_a_clock_that_is_off_never_waits(now: SimpleNamespace) -> None:
    clock = SendClock(0.0)
    now.now_s += 0.03
    assert clock.wait_s() == 0
    assert not clock.is_on


def test_a_stream_whose_client_does_not_read_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_events, "SLOW_READER_S", 0.02)
    sent, ended = list[str](), list[str]()

    async def events() -> AsyncGenerator[str]:
        try:
            for text in ("a", "b", "c"):
                yield text
        finally:
            ended.append("closed")

    async def send(message: Any) -> None:
        if message.get("body") == b"b":
            await asyncio.Event().wait()  # the connection's buffers are full
        sent.append(message["type"])

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(EventStream(events(), on_end=lambda: ended.append("ended"))(scope, receive, send))
    assert sent == ["http.response.start", "http.response.body"], "no end, so that a client knows what it has missed"
    assert ended == ["closed", "ended"]


def test_a_stream_of_which_not_even_the_headers_can_be_sent_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator that has not begun does nothing when it is closed."""
    monkeypatch.setattr(stream_events, "SLOW_READER_S", 0.02)
    ended = list[str]()

    async def events() -> AsyncGenerator[str]:
        yield "a"

    async def blocked(*_: Any) -> Any:
        await asyncio.Event().wait()

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(EventStream(events(), on_end=lambda: ended.append("ended"))(scope, blocked, blocked))
    assert ended == ["ended"]
