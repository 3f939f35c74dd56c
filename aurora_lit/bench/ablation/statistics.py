"""Statistics of acceptance: accepted length, acceptance rates, modelled speed-up, confidence intervals.

Each request is represented by a histogram: how many of its rounds accepted 0, 1, … K proposals. All statistics are
functions of sums of these histograms.

Shapes: N requests, A = K + 1 numbers of accepted proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aurora_lit.traces.record import Trace

Histograms = NDArray[np.float64]
"""[N, A]"""
_SAMPLES = 1000


def accepted_histogram(trace: Trace, *, num_proposed: int) -> list[int]:
    """How many rounds of a trace accepted 0, 1, … num_proposed proposals."""
    counts: list[int] = np.bincount(trace.num_accepted_R.numpy(), minlength=num_proposed + 1).tolist()
    return counts


def accepted_length(hist_NA: Histograms) -> float:
    """Tokens per round, the target's own token included; 1 without rounds."""
    counts_A = hist_NA.sum(0)
    return 1 + float(counts_A @ np.arange(len(counts_A))) / max(1.0, float(counts_A.sum())) if len(counts_A) else 1.0


def acceptance_by_position(hist_NA: Histograms) -> list[float]:
    """Share of rounds that accepted proposal 1, 2, … K, and all before it."""
    counts_A = hist_NA.sum(0)
    return [float(counts_A[position:].sum() / max(1.0, counts_A.sum())) for position in range(1, len(counts_A))]


def acceptance_rate(hist_NA: Histograms) -> float:
    """Accepted proposals divided by all proposals, K per round."""
    shares = acceptance_by_position(hist_NA)
    return sum(shares) / max(1, len(shares))


def rate_when_tested(hist_NA: Histograms) -> float:
    """Accepted proposals divided by tested ones; a round tests its proposals up to the first rejection."""
    counts_A = hist_NA.sum(0)
    accepted = float(counts_A @ np.arange(len(counts_A)))
    rejected = float(counts_A[:-1].sum())
    return accepted / max(1.0, accepted + rejected)


def speed_up(hist_NA: Histograms, costs: Mapping[str, Any]) -> float:
    """Modelled speed relative to plain decoding, for one request at a time and the best fixed number of proposals k:

        max_k  (1 + Σ_{i≤k} P(proposals 1 … i accepted)) · target(1) / (target(k + 1) + first_step + (k − 1)·next_step)

    and at least 1 (k = 0). The costs are the seconds of a target pass by query length, and of draft steps, measured on
    this machine (serve/speculation/calibration.py). Prefill, sampling and concurrent learning are not modelled.
    """
    target_s = costs["target_s"]
    tokens, best = 1.0, 1.0
    for k, share in enumerate(acceptance_by_position(hist_NA), start=1):
        tokens += share
        seconds = target_s[k] + costs["first_step_s"] + (k - 1) * costs["next_step_s"]
        best = max(best, tokens * target_s[0] / seconds)
    return best


def interval(
    statistic: Callable[..., float], *tables: Histograms, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap over requests (Efron 1979). Several tables are resampled with the same requests."""
    rng = np.random.default_rng(seed)
    count = len(tables[0])
    if count < 2:
        value = statistic(*tables)
        return value, value
    samples = [
        statistic(*(table[chosen] for table in tables)) for chosen in rng.integers(count, size=(_SAMPLES, count))
    ]
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def length_ratio(hist_NA: Histograms, base_hist_NA: Histograms) -> float:
    """Ratio of two accepted lengths."""
    return accepted_length(hist_NA) / accepted_length(base_hist_NA)


def tokens_to_adapt(
    hist_NA: Histograms, base_hist_NA: Histograms, tokens_N: Sequence[int], *, window: int, share: float = 0.9
) -> int | None:
    """Tokens of a phase until the gain over the base draft has gone `share` of the way from first to final value.

    None if the gain grows by less than 1 %. The gain is the ratio of accepted lengths in a sliding window of requests,
    the same for both drafts, so that easy requests do not look like learning. The first value is that of the first
    window, the final one that of the last quarter.
    """
    count = len(hist_NA)
    if count < 2 * window:
        return None
    windows = [slice(start, start + window) for start in range(count - window + 1)]
    gains = [length_ratio(hist_NA[each], base_hist_NA[each]) for each in windows]
    last = slice(count - max(window, count // 4), count)
    first, final = gains[0], length_ratio(hist_NA[last], base_hist_NA[last])
    if final < first * 1.01:
        return None
    for each, gain in zip(windows, gains, strict=True):
        if gain >= first + share * (final - first):
            return int(sum(tokens_N[: each.stop]))
    return int(sum(tokens_N))
