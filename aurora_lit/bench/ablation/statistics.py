"""Statistics of acceptance: accepted length, acceptance rate, modelled speed-up, confidence intervals.

Each request is represented by three histograms of its rounds: how many tokens they accepted, how many copied ones they
would have accepted alone, and how many copied ones they proposed. All statistics are functions of sums of these.

Shapes: N requests, A = 1 + most tokens that a round accepts, X resamples, S seeds, Q different requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aurora_lit.learn.offline.copies import CopiedTokens
from aurora_lit.traces.record import Trace

Histograms = NDArray[np.float64]
"""[N, A]"""
ACCEPTED, COPIED, PROPOSED = 0, 1, 2
"""Rows of a request's counts: rounds by accepted tokens, by accepted copies alone, by proposed copies."""
_SAMPLES = 1000


def round_counts(trace: Trace, copied: CopiedTokens | None, *, reach: int) -> list[list[int]]:
    """The three histograms [3, A] of a trace's rounds, A = reach + 1.

    `copied`: what was copied beside the draft's proposals (learn/offline/on_policy.py).
    """
    root_R = trace.round_root_R.long()
    copied_2R = torch.zeros(2, len(root_R), dtype=torch.int64)
    if copied is not None:
        copied_2R = torch.tensor([copied.accepted_T, copied.proposed_T])[:, root_R]
    accepted_R = torch.maximum(trace.num_accepted_R.long(), copied_2R[0])
    return [torch.bincount(each_R, minlength=reach + 1).tolist() for each_R in (accepted_R, *copied_2R)]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Requests with the rounds that they had with each seed: a row for each."""

    counts_N3A: NDArray[np.float64]
    seed_N: NDArray[np.int64]
    request_N: NDArray[np.str_]

    @property
    def hist_NA(self) -> Histograms:
        """Rounds by accepted tokens."""
        return self.counts_N3A[:, ACCEPTED]

    def select(self, mask_N: NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        return Rows(counts_N3A=self.counts_N3A[mask_N], seed_N=self.seed_N[mask_N], request_N=self.request_N[mask_N])


def accepted_length(hist_NA: Histograms) -> float:
    """Tokens per round, the target's own token included; 1 without rounds."""
    counts_A = hist_NA.sum(0)
    return 1 + float(counts_A @ np.arange(len(counts_A))) / max(1.0, float(counts_A.sum())) if len(counts_A) else 1.0


def acceptance_by_position(hist_NA: Histograms) -> list[float]:
    """Share of rounds that accepted proposal 1, 2, … K, and all before it."""
    counts_A = hist_NA.sum(0)
    return [float(counts_A[position:].sum() / max(1.0, counts_A.sum())) for position in range(1, len(counts_A))]


def proposed_copies(counts_N3A: NDArray[np.float64]) -> float:
    """Copied tokens that a round proposes."""
    rounds_A = counts_N3A[:, PROPOSED].sum(0)
    return float(rounds_A @ np.arange(len(rounds_A))) / max(1.0, float(rounds_A.sum()))


def acceptance_rate(counts_N3A: NDArray[np.float64], *, draft_tokens: int) -> float:
    """Accepted proposals divided by all proposals; `draft_tokens`: the draft's in each round, copies not included."""
    proposed = draft_tokens + proposed_copies(counts_N3A)
    return (accepted_length(counts_N3A[:, ACCEPTED]) - 1) / proposed if proposed else 0.0


def speed_up(counts_N3A: NDArray[np.float64], costs: Mapping[str, Any]) -> float:
    """Modelled speed relative to plain decoding, for one request at a time and the best fixed length k of the chain:

        max_k  (1 + Σ_{i≤k} P(i accepted) + Σ_{i>k} P(i copies accepted)) · target(1)
               / (Σ_w P(w copies proposed) · target(1 + k + w) + first_step + (k − 1)·next_step)

    and at least 1: a server may decode plainly. For k = 0 no draft runs. The costs are the seconds of a target pass by
    query length, and of draft steps, measured on this machine (serve/speculation/calibration.py). A token that is both
    copied and drafted counts as two columns; copies are never left out, as a server does where they do not pay.
    Prefill, sampling and concurrent learning are not modelled.
    """
    target_s = costs["target_s"]
    width_A = counts_N3A[:, PROPOSED].sum(0)
    if not width_A.sum():
        return 1.0
    width_A = width_A / width_A.sum()
    share_P, copied_P = (acceptance_by_position(counts_N3A[:, row]) for row in (ACCEPTED, COPIED))
    best = 1.0
    for k in range(costs["draft_tokens"] + 1):
        tokens = 1 + sum(share_P[:k]) + sum(copied_P[k:])
        seconds = sum(float(share) * target_s[k + w] for w, share in enumerate(width_A) if share)
        if k:
            seconds += costs["first_step_s"] + (k - 1) * costs["next_step_s"]
        best = max(best, tokens * target_s[0] / seconds)
    return best


def interval(
    statistic: Callable[..., float], rows: Rows, *others: Rows, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap over seeds and requests (Efron 1979) of a statistic of each Rows' `hist_NA`.

    Seeds and requests are drawn independently of each other, and a row counts as often as both of its were (Owen and
    Eckles, arXiv 1106.2125), so requests that several seeds have in common are drawn for all of them. `others`: the
    same seeds and requests in the same order, as with another arm; they are drawn together, in pairs. With one seed
    the interval does not know how training varies, and with two or three it knows it badly.
    """
    rng = np.random.default_rng(seed)
    if not len(rows.seed_N):
        value = statistic(*(each.hist_NA for each in (rows, *others)))
        return value, value
    weight_XN = np.ones((_SAMPLES, len(rows.seed_N)))
    for label_N in (rows.seed_N, rows.request_N):
        labels, index_N = np.unique(label_N, return_inverse=True)
        weight_XN *= rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=_SAMPLES)[:, index_N]
    sums = [weight_XN @ each.hist_NA for each in (rows, *others)]
    samples = [statistic(*(sum_XA[x : x + 1] for sum_XA in sums)) for x in range(_SAMPLES)]
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def length_ratio(hist_NA: Histograms, base_hist_NA: Histograms) -> float:
    """Ratio of two accepted lengths."""
    return accepted_length(hist_NA) / accepted_length(base_hist_NA)


def length_difference(hist_NA: Histograms, base_hist_NA: Histograms) -> float:
    """Difference of two accepted lengths, in tokens a round."""
    return accepted_length(hist_NA) - accepted_length(base_hist_NA)


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
