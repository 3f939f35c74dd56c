"""Detects shifts of the traffic: in its mix of domains, and in how well a domain's proposals are accepted.

Both thresholds follow from a stated rate of false alarms, MEAN_REQUESTS_BETWEEN_FALSE_ALARMS.

The mix is tested by Bayes factors. For each of the last requests that could have begun a new mix, `change_evidence`
compares two accounts of the domains seen since the last shift: two mixes, one before that request and one from it on,
or a single mix. While nothing changes, a Bayes factor is 1 in the mean, so their sum over the possible beginnings
reaches A once in A requests or less often (T. L. Lai, IEEE Transactions on Information Theory 44, 1998; G. Lorden and
M. Pollak, Annals of Statistics 33, 2005). The mixes are not known; a Dirichlet prior takes the place of each.

A drop of acceptance is tested by a cumulative sum of standardised residuals (E. S. Page, Biometrika 41, 1954).

State is plain numbers and strings. Leaves out which domain a request has (modules/domains/detector.py).

Shapes: N requests, S possible beginnings of a new mix, D domains among the requests, L lags.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

MEAN_REQUESTS_BETWEEN_FALSE_ALARMS = 30_000
"""Of each of the two tests, in steady traffic."""

_MAX_REQUESTS = 256
"""Requests that the mix is compared with, the new ones included; older ones are forgotten."""
_MAX_NEW_REQUESTS = 64
"""A new mix may have begun so many requests ago."""
_MIN_BEFORE_REQUESTS = 64
"""Requests of the mix before: fewer do not show whether they come in bursts."""
_MIN_NEW_REQUESTS = 6
"""Requests of a new mix before it is told: its domain is founded by then."""
_PRIOR = 0.5
"""Parameter of the Dirichlet prior, for each domain (Jeffreys' prior)."""
_LATEST_MIX_REQUESTS = 32
"""Requests whose mix is reported."""
_MAX_LAG = 12
"""Requests over which bursts are looked for."""
_PRIOR_CHANGES = 4.0
"""Requests of another domain that are added to those expected: without evidence, requests are taken as independent."""


def change_evidence(domains: Sequence[str]) -> tuple[float, int]:
    """How likely the mix of domains has changed: the log of the sum of Bayes factors, and the likeliest beginning.

    Requests of a kind may come in bursts, which tell less about the mix than as many independent requests. So counts
    are multiplied by the share of independent requests before.

    Returns:
        The evidence, -inf for too few requests, and the index of the first request of the new mix.
    """
    first, last = max(_MIN_BEFORE_REQUESTS, len(domains) - _MAX_NEW_REQUESTS), len(domains) - 1
    if first > last:
        return -math.inf, 0
    number_of = {name: number for number, name in enumerate(dict.fromkeys(domains))}
    number_N = np.array([number_of[name] for name in domains])
    upto_ND = (number_N[:, None] == np.arange(len(number_of))).cumsum(0, dtype=np.float64)
    before_SD = upto_ND[first - 1 : last]
    share_S1 = _independent_share(number_N, before_SD)[:, None]
    before_SD, total_SD = share_S1 * before_SD, share_S1 * upto_ND[-1]
    before_S, after_S, all_S = _log_marginals(np.stack([before_SD, total_SD - before_SD, total_SD]))
    evidence_S = before_S + after_S - all_S
    return float(np.logaddexp.reduce(evidence_S)), first + int(evidence_S.argmax())


def _log_marginals(count_SD: Array) -> Array:
    """Log-probabilities of sequences with these counts under a mix drawn from the prior; [., D] to [.]."""
    total = count_SD.shape[-1] * _PRIOR
    of_domain_SD = _log_gamma(count_SD + _PRIOR) - math.lgamma(_PRIOR)
    log_marginal: Array = of_domain_SD.sum(-1) + math.lgamma(total) - _log_gamma(count_SD.sum(-1) + total)
    return log_marginal


def _log_gamma(x: Array) -> Array:
    return torch.lgamma(torch.from_numpy(x)).numpy()


def _independent_share(number_N: Array, before_SD: Array) -> Array:
    """Effective number of requests / number of requests, of those before each possible beginning, [S].

    That is 1 / (1 + 2 · the sum of the autocorrelations at lags up to _MAX_LAG), at most 1. The autocorrelation of
    domains at a lag is 1 − (how often they differ at that lag) / (how often two requests of the mix differ).
    """
    before_S = before_SD.sum(1)
    lag_L = np.arange(_MAX_LAG, 0, -1)
    padded = np.concatenate([np.full(_MAX_LAG, -1), number_N])
    earlier_NL = np.lib.stride_tricks.sliding_window_view(padded, _MAX_LAG + 1)[:, :-1]
    differing_NL = ((earlier_NL != number_N[:, None]) & (earlier_NL >= 0)).cumsum(0)
    differing_SL = differing_NL[before_S.astype(np.int64) - 1]
    share_differing_S1 = 1 - np.square(before_SD).sum(1, keepdims=True) / np.square(before_S)[:, None]
    expected_SL = share_differing_S1 * (before_S[:, None] - lag_L)
    correlation_S = ((expected_SL - differing_SL) / (expected_SL + _PRIOR_CHANGES)).sum(1)
    share_S: Array = 1 / (1 + 2 * np.maximum(correlation_S, 0))
    return share_S


class MixShiftDetector:
    """Detects that the mix of domains has changed; see the file's docstring.

    >>> mix = MixShiftDetector()
    >>> mix.add("auto-1")
    >>> mix.shift()             # the domain whose share has grown most, at a shift
    """

    def __init__(self) -> None:
        self.domains: list[str] = []
        """Of the requests since the last shift."""

    @property
    def shares(self) -> dict[str, float]:
        """The mix of the latest requests."""
        recent = self.domains[-_LATEST_MIX_REQUESTS:]
        return {name: count / len(recent) for name, count in Counter(recent).items()}

    def add(self, domain: str) -> None:
        """Add a request."""
        self.domains.append(domain)
        del self.domains[:-_MAX_REQUESTS]

    @property
    def has_changed(self) -> bool:
        """True if the evidence of a change is beyond the threshold."""
        evidence, first = change_evidence(self.domains)
        has_begun = len(self.domains) - first >= _MIN_NEW_REQUESTS
        return has_begun and evidence > math.log(MEAN_REQUESTS_BETWEEN_FALSE_ALARMS)

    def start_anew(self) -> str:
        """Forget the mix before the likeliest change; returns the domain whose share has grown most with it."""
        at = change_evidence(self.domains)[1]
        before, after = Counter(self.domains[:at]), Counter(self.domains[at:])
        self.domains = self.domains[at:]
        return max(after, key=lambda name: after[name] / after.total() - before[name] / before.total())


_LATEST_REQUESTS, _MEAN_REQUESTS = 4, 128
"""Memory of a domain's latest acceptance rate and of the mean that it is compared with."""
_MIN_REQUESTS = 32
"""Requests of a domain before a drop can be detected: the mean must be known."""
_TOLERANCE = 0.5
"""Drop of the mean that is ignored, in standard deviations of a request's rate."""
_MOST_DEVIATIONS = 3.0
"""A single request counts no more than this, in standard deviations."""


def cusum_threshold(mean_requests: float, tolerance: float) -> float:
    """The threshold that a sum of standard normal values less a tolerance exceeds once in so many values.

    D. Siegmund, Sequential Analysis (1985): mean = (exp(2 t b) − 1 − 2 t b) / (2 t²), with b = threshold + 1.166.
    """
    low, high = 0.0, 1000.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        b = 2 * tolerance * (middle + 1.166)
        # Compared as logarithms, so that nothing overflows.
        longer = b + math.log1p(-(1 + b) * math.exp(-b)) > math.log(mean_requests * 2 * tolerance**2)
        low, high = (low, middle) if longer else (middle, high)
    return high


_THRESHOLD = cusum_threshold(MEAN_REQUESTS_BETWEEN_FALSE_ALARMS, _TOLERANCE)


class AcceptanceDropDetector:
    """Detects that the draft's acceptance rate in one domain has dropped.

    The test is on the residual against a mean that follows the draft's progress, divided by its standard deviation: a
    request has few proposals, so its rate is noisy. The variance is that of the residuals around their own mean, which
    the draft's progress raises. A rise is not reported.
    """

    def __init__(self) -> None:
        self._num_requests = 0
        self.mean = self._latest = 0.0
        """`mean`: the acceptance rate that is expected of the next request."""
        self._residual = self._variance = 0.0
        self._sum = 0.0

    def start_anew(self) -> None:
        """Learn the mean anew from the next requests, as after a shift of the mix, which changes whose they are."""
        self._num_requests, self._sum = min(self._num_requests, _LATEST_REQUESTS), 0.0

    def update(self, acceptance: float) -> float:
        """Add a request's acceptance rate; at a drop, its size as a share of the mean, else 0."""
        residual = acceptance - self.mean
        deviation = math.sqrt(self._variance)
        if self._num_requests >= _MIN_REQUESTS and deviation:
            fall = max(-_MOST_DEVIATIONS, min(_MOST_DEVIATIONS, -residual / deviation))
            self._sum = max(0.0, self._sum + fall - _TOLERANCE)
        self._num_requests += 1
        rate = max(1 / self._num_requests, 1 / _MEAN_REQUESTS)
        self.mean += rate * residual
        deviation_of_residual = residual - self._residual
        self._residual += rate * deviation_of_residual
        self._variance = (1 - rate) * (self._variance + rate * deviation_of_residual**2)
        self._latest += max(1 / self._num_requests, 1 / _LATEST_REQUESTS) * (acceptance - self._latest)
        if self._sum <= _THRESHOLD:
            return 0.0
        drop = max(0.0, 1 - self._latest / max(self.mean, 1e-6))
        self.mean = self._latest
        self.start_anew()
        return drop

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "num_requests": self._num_requests,
            "mean": self.mean,
            "variance": self._variance,
            "latest": self._latest,
            "residual": self._residual,
            "sum": self._sum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._num_requests, self.mean, self._latest = state["num_requests"], state["mean"], state["latest"]
        self._variance, self._residual, self._sum = state["variance"], state["residual"], state["sum"]
