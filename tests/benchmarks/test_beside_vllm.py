"""Speeds of streams beside vLLM: tokens are those that came, and a request that failed is not a fast one."""

from __future__ import annotations

from typing import Any

import pytest

from aurora_lit.bench.load import Answer
from benchmarks import beside_vllm
from benchmarks.beside_vllm import Counters, block


def test_tokens_are_those_that_came_and_gaps_are_between_pieces_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[dict[str, Any]] = []

    def ask(url: str, body: dict[str, Any]) -> Answer:
        bodies.append(body)
        return Answer(sent_s=0.0, ended_s=4.0, text="abc", tokens=7, pieces_s=(1.0, 2.0, 3.5))

    monkeypatch.setattr(beside_vllm, "ask", ask)
    times = iter((0.0, 4.0))
    monkeypatch.setattr(beside_vllm.time, "monotonic", lambda: next(times, 4.0))
    speed, gaps = block("http://server", ["one", "two"], 1)
    assert speed == 14 / 4
    assert gaps == [1.0, 1.5] * 2
    assert all(body["ignore_eos"] and body["stream"] and body["max_tokens"] == 96 for body in bodies)


def test_accepted_length_counts_the_target_s_own_token() -> None:
    before, after = Counters(drafts=10, accepted=20), Counters(drafts=14, accepted=26)
    assert after.accepted_length_since(before) == 2.5
