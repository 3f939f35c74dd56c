"""The statistics of bench ablation are right, and its intervals cover what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.trace_examples import numbered_trace

from aurora_lit.bench.ablation.statistics import (
    Rows,
    acceptance_by_position,
    acceptance_rate,
    accepted_length,
    interval,
    length_difference,
    length_ratio,
    round_counts,
    speed_up,
    tokens_to_adapt,
)
from aurora_lit.learn.offline.copies import CopiedTokens

COSTS = {"draft_tokens": 3, "target_s": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "first_step_s": 0.2, "next_step_s": 0.1}


def counts_of(accepted: list[float], copied: list[float] | None = None, width: int = 0) -> NDArray[np.float64]:
    """Counts of one request [1, 3, A]; `width`: copies that each round proposes."""
    total, A = sum(accepted), len(accepted)
    none = [total] + [0.0] * (A - 1)
    return np.array([[accepted, copied or none, np.roll(none, width)]])


def rows_of(hist_NA: NDArray[np.float64], *, seed_N: list[int] | None = None, names: list[str] | None = None) -> Rows:
    N, A = hist_NA.shape
    return Rows(
        counts_N3A=np.concatenate([hist_NA[:, None], np.zeros((N, 2, A))], axis=1),
        seed_N=np.array(seed_N if seed_N is not None else [0] * N),
        request_N=np.array(names if names is not None else [str(n) for n in range(N)]),
    )


def test_accepted_length_and_rates_follow_from_histograms() -> None:
    histograms = np.array([[4.0, 2, 0, 2], [1, 0, 0, 1]])  # rounds that accepted 0, 1, 2, 3
    assert accepted_length(histograms) == pytest.approx(1 + (2 * 1 + 3 * 3) / 10)
    assert acceptance_by_position(histograms) == pytest.approx([0.5, 0.3, 0.3])
    assert accepted_length(np.zeros((0, 4))) == 1
    assert acceptance_rate(counts_of([5, 2, 0, 3]), draft_tokens=3) == pytest.approx(11 / 30)
    assert acceptance_rate(counts_of([5, 2, 0, 3], width=2), draft_tokens=3) == pytest.approx(11 / 50)


def test_rounds_accept_the_better_of_copies_and_draft() -> None:
    trace = replace(
        numbered_trace(20, answer_start=4),
        round_root_R=torch.tensor([4, 6, 10], dtype=torch.int32),
        num_accepted_R=torch.tensor([1, 0, 2], dtype=torch.int16),
    )
    accepted_T, proposed_T = [0] * 20, [0] * 20
    for root, accepted, proposed in ((4, 0, 2), (6, 3, 4), (10, 4, 4)):
        accepted_T[root], proposed_T[root] = accepted, proposed
    found = round_counts(trace, CopiedTokens(accepted_T, proposed_T), reach=4)
    assert found == [[0, 1, 0, 1, 1], [1, 0, 0, 1, 1], [0, 0, 1, 0, 2]]
    assert round_counts(trace, None, reach=4) == [[1, 1, 1, 0, 0], [3, 0, 0, 0, 0], [3, 0, 0, 0, 0]]


def test_the_modelled_speed_up_uses_the_best_number_of_proposals() -> None:
    assert speed_up(counts_of([0, 0, 0, 5]), COSTS) == pytest.approx(4 / (1.3 + 0.2 + 2 * 0.1))
    assert speed_up(counts_of([5, 0, 0, 0]), COSTS) == 1, "plain decoding is a choice too"
    assert speed_up(counts_of([2, 8, 0, 0]), COSTS) == pytest.approx(1.8 / (1.1 + 0.2))


def test_the_modelled_speed_up_pays_for_the_width_of_copies_and_may_do_without_the_draft() -> None:
    copied = counts_of([0, 0, 0, 5], copied=[0, 0, 0, 5], width=2)
    assert speed_up(copied, COSTS) == pytest.approx(4 / 1.2), "the draft adds nothing"
    some = counts_of([0, 0, 4, 4], copied=[4, 0, 0, 4], width=2)
    tokens = [1 + 3 / 2, 1 + 1 + 1 / 2 + 1 / 2, 1 + 1 + 1 + 1 / 2]  # k = 0, 1, 2
    seconds = [1.2, 1.3 + 0.2, 1.4 + 0.3]
    assert speed_up(some, COSTS) == pytest.approx(max(t / s for t, s in zip(tokens, seconds, strict=True)))


def test_intervals_have_their_nominal_coverage() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        histograms = rng.multinomial(12, [0.5, 0.3, 0.1, 0.1], size=60).astype(float)
        low, high = interval(accepted_length, rows_of(histograms), seed=trial)
        covered += low <= 1.8 <= high
    assert 0.86 <= covered / 100 <= 0.995
    rows = rows_of(histograms)
    assert interval(length_ratio, rows, rows) == (1, 1), "both are resampled with the same requests"
    assert interval(length_difference, rows, rows) == (0, 0)
    assert interval(accepted_length, rows_of(histograms[:0])) == (1, 1)


@pytest.mark.parametrize("shared", [True, False])
def test_intervals_know_that_training_varies_with_the_seed(shared: bool) -> None:
    """Differences between two arms, where each seed trained a draft that is better or worse by its own amount."""
    rng, seeds, requests = np.random.default_rng(1), 10, 25
    covered, narrow = 0, 0
    names = [f"{'' if shared else s} {n}" for s in range(seeds) for n in range(requests)]
    seed_N = [s for s in range(seeds) for _ in range(requests)]
    for trial in range(40):
        luck_S = rng.normal(0, 0.05, size=seeds)
        own, base = (
            np.concatenate([rng.multinomial(20, [0.5 - x, 0.5 + x], size=requests) for x in luck]).astype(float)
            for luck in (luck_S, np.zeros(seeds))
        )
        for is_known, labels in ((True, seed_N), (False, [0] * len(seed_N))):
            rows = [rows_of(each, seed_N=labels, names=names) for each in (own, base)]
            low, high = interval(length_difference, *rows, seed=trial)
            if is_known:
                covered += low <= 0 <= high
            else:
                narrow += low <= 0 <= high
    assert covered / 40 >= 0.85
    assert narrow < covered - 5, "requests alone vary less"


def test_requests_that_seeds_have_in_common_are_drawn_for_all_of_them() -> None:
    """Copies of one seed's results say nothing new about which prompts are easy."""
    one = np.random.default_rng(2).multinomial(12, [0.5, 0.3, 0.1, 0.1], size=50).astype(float)
    names, seed_N = [str(n) for n in range(50)] * 6, [s for s in range(6) for _ in range(50)]
    low, high = interval(accepted_length, rows_of(one))
    of_six = interval(accepted_length, rows_of(np.tile(one, (6, 1)), seed_N=seed_N, names=names))
    assert of_six[1] - of_six[0] == pytest.approx(high - low, rel=0.1)


def test_adaptation_is_counted_until_the_gain_nears_its_final_value() -> None:
    base = np.tile([6.0, 4, 0, 0], (100, 1))
    gain = np.minimum(1.0, np.arange(100) / 50)  # reaches its final value at request 50
    own = base + gain[:, None] * np.array([-4.0, 0, 0, 4])
    tokens = tokens_to_adapt(own, base, [10] * 100, window=5)
    assert tokens is not None
    assert 450 <= tokens <= 530
    assert tokens_to_adapt(base, base, [10] * 100, window=5) is None, "nothing is gained"
    assert tokens_to_adapt(own[:9], base[:9], [10] * 9, window=5) is None, "too few requests"
