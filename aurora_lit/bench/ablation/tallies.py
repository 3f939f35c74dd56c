"""What rounds of many requests say: accepted length, acceptance, speed, and how sure that is.

A request is its *tally*: how many of its rounds accepted 0, 1, … K proposals. Everything else follows from sums of
these.
What is left out: where tallies come from (bench/ablation/run.py).

Shapes: N requests, A = K + 1 accepted counts, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aurora_lit.traces.record import Trace

Tallies = NDArray[np.float64]
"""[N, A]"""
_SAMPLES = 1000


def tally(trace: Trace, *, num_proposed: int) -> list[int]:
    """Of a trace whose rounds all proposed so many, or to their first rejection."""
    counts: list[int] = np.bincount(trace.num_accepted_R.numpy(), minlength=num_proposed + 1).tolist()
    return counts


def accepted_length(tallies_NA: Tallies) -> float:
    """Tokens a round, the corrected or bonus token included; 1 of nothing."""
    counts_A = tallies_NA.sum(0)
    return 1 + float(counts_A @ np.arange(len(counts_A))) / max(1.0, float(counts_A.sum())) if len(counts_A) else 1.0


def reached(tallies_NA: Tallies) -> list[float]:
    """Share of rounds that accepted proposal 1, 2, … K and all before it."""
    counts_A = tallies_NA.sum(0)
    return [float(counts_A[place:].sum() / max(1.0, counts_A.sum())) for place in range(1, len(counts_A))]


def acceptance_rate(tallies_NA: Tallies) -> float:
    """Accepted by proposed, K proposals a round."""
    shares = reached(tallies_NA)
    return sum(shares) / max(1, len(shares))


def rate_when_tested(tallies_NA: Tallies) -> float:
    """Accepted by tested: a round tests its proposals up to the first rejection."""
    counts_A = tallies_NA.sum(0)
    accepted = float(counts_A @ np.arange(len(counts_A)))
    rejected = float(counts_A[:-1].sum())
    return accepted / max(1.0, accepted + rejected)


def speed_up(tallies_NA: Tallies, costs: Mapping[str, Any]) -> float:
    """Modelled tokens a second over plain decoding, one request at a time, with the best fixed number of proposals k:

        max_k  (1 + Σ_{i≤k} P(proposals 1 … i accepted)) · target(1) / (target(k + 1) + first_step + (k − 1)·next_step)

    and at least 1 (k = 0). The costs are seconds of a target pass by its width and of draft steps, measured on the
    machine (serve/speculation/calibration.py). Reading prompts, sampling and learning beside it are not in the model.
    """
    target_s = costs["target_s"]
    tokens, best = 1.0, 1.0
    for k, share in enumerate(reached(tallies_NA), start=1):
        tokens += share
        seconds = target_s[k] + costs["first_step_s"] + (k - 1) * costs["next_step_s"]
        best = max(best, tokens * target_s[0] / seconds)
    return best


def interval(
    statistic: Callable[..., float], *tables: Tallies, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap over requests (Efron 1979); several tables are resampled together, request by request."""
    rng = np.random.default_rng(seed)
    count = len(tables[0])
    if count < 2:
        value = statistic(*tables)
        return value, value
    found = [statistic(*(table[chosen] for table in tables)) for chosen in rng.integers(count, size=(_SAMPLES, count))]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def length_ratio(tallies_NA: Tallies, base_NA: Tallies) -> float:
    """Accepted length by accepted length."""
    return accepted_length(tallies_NA) / accepted_length(base_NA)


def tokens_to_adapt(
    tallies_NA: Tallies, base_NA: Tallies, tokens_N: Sequence[int], *, window: int, share: float = 0.9
) -> int | None:
    """Tokens of traffic until a phase's gain over the base draft has come `share` of the way from its beginning to its
    final level; None where it does not gain (less than 1 %).

    The gain is the ratio of accepted lengths over a sliding window of requests, the same for both drafts, so that easy
    and hard requests do not count as learning; the beginning is the first window, the final level the last quarter.
    """
    count = len(tallies_NA)
    if count < 2 * window:
        return None
    gains = [length_ratio(tallies_NA[at : at + window], base_NA[at : at + window]) for at in range(count - window + 1)]
    last = slice(count - max(window, count // 4), count)
    began, final = gains[0], length_ratio(tallies_NA[last], base_NA[last])
    if final < began * 1.01:
        return None
    for at, gain in enumerate(gains):
        if gain >= began + share * (final - began):
            return int(sum(tokens_N[: at + window]))
    return int(sum(tokens_N))
