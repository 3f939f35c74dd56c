"""Speeds of streams beside vLLM: tokens are those that came, and a request that failed is not a fast one."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from aurora_lit.errors import AuroraError
from benchmarks import beside_vllm
from benchmarks.beside_vllm import block, percentile_ms

CHUNK = {"choices": [{"delta": {"content": "a"}}]}
ERROR = {"error": {"message": "the engine died", "code": 500}}


def usage(tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": tokens}}


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the server answer every request with a status and these events."""

    def answer(*events: dict[str, Any], status: int = 200) -> None:
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        client = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(status, text=body)))
        monkeypatch.setattr(beside_vllm.httpx, "stream", client.stream)

    return answer


def test_tokens_are_those_that_came_and_gaps_are_between_chunks_of_text(
    answering: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(CHUNK, CHUNK, CHUNK, usage(7))
    times = iter(range(100))
    monkeypatch.setattr(beside_vllm, "time", SimpleNamespace(perf_counter=lambda: float(next(times))))
    speed, gaps = block("http://server", ["one", "two"], 1)
    assert [gap for _, gap in gaps] == [1.0] * 4
    assert speed == pytest.approx(14 / 9)  # eight events, and the end


def test_a_percentile_is_not_beyond_the_largest_gap() -> None:
    assert percentile_ms([0.01] * 11 + [0.1], 99) == pytest.approx(90.1)
    assert percentile_ms([0.02], 99) == 20
    assert percentile_ms([], 99) is None


def test_a_request_that_failed_ends_the_measurement(answering: Callable[..., None]) -> None:
    for status in (400, 429, 500):
        answering(ERROR, status=status)
        with pytest.raises(httpx.HTTPStatusError):
            block("http://server", ["one"], 1)
    for events in ((CHUNK, CHUNK, ERROR), (CHUNK,)):
        answering(*events)
        with pytest.raises(AuroraError, match="http://server: a stream ended without its usage"):
            block("http://server", ["one"], 1)
