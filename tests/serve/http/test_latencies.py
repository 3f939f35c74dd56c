"""Latencies of a call: what is measured from where, and that tokens which arrive together share their time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from aurora_lit.serve.http import routes
from aurora_lit.serve.http.answer_stream import TextDelta


def delta(index: int, num_tokens: int) -> TextDelta:
    return TextDelta(index=index, text="x" * num_tokens, token_ids=(7,) * num_tokens)


def test_tokens_that_arrive_together_share_the_time_since_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(routes.time, "monotonic", lambda: clock.now)
    found: dict[str, list[float]] = {"first_token": [], "between_tokens": [], "whole_request": []}
    metrics: Any = SimpleNamespace(**{name: SimpleNamespace(observe=each.append) for name, each in found.items()})
    recorder = routes._LatencyRecorder(metrics)
    for seconds, deltas in ((2, [(0, 3), (1, 1)]), (1, [(0, 4)]), (1, [(0, 0), (1, 2)]), (5, [(1, 0)])):
        clock.now += seconds
        recorder.record(tuple(delta(index, num_tokens) for index, num_tokens in deltas))
    recorder.end()
    assert found["first_token"] == [2, 2], "of both choices"
    assert found["between_tokens"] == [0.25] * 4 + [1.0] * 2
    assert found["whole_request"] == [4], "up to the last token"
