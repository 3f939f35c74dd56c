"""What a learner costs: windows with it against those without."""

from __future__ import annotations

import pytest

from aurora_lit.bench.load import Answer
from benchmarks.beside_learner import Window, compare


def answer(*pieces_s: float) -> Answer:
    return Answer(sent_s=0.0, ended_s=pieces_s[-1], text="text", tokens=7, pieces_s=pieces_s)


def test_windows_are_compared_in_pairs_and_gaps_across_their_ends_are_left_out() -> None:
    windows = [
        Window(learns=False, begin_s=0.0, end_s=10.0, tokens_per_s=50.0),
        Window(learns=True, begin_s=10.0, end_s=20.0, tokens_per_s=45.0),
        Window(learns=True, begin_s=20.0, end_s=30.0, tokens_per_s=80.0),
        Window(learns=False, begin_s=30.0, end_s=40.0, tokens_per_s=100.0),
    ]
    answers = [answer(1.0, 1.5, 9.0, 11.0, 11.5), answer(12.0, 13.0, 22.0, 23.0, 31.0, 31.5)]
    assert windows[0].gaps_ms(answers) == [500.0, 7500.0]
    assert windows[1].gaps_ms(answers) == [500.0, 1000.0]
    found = compare(windows, answers)
    on, off, (mean, low, high) = found["tokens/s"]
    assert (on, off) == (62.5, 75.0)
    assert mean == pytest.approx((0.9 * 0.8) ** 0.5)
    assert low < mean < high
    assert found["gap p50, ms"][:2] == (875.0, 2250.0)
