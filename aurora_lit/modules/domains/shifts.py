"""Detects shifts of the traffic: in its mix of domains, and in how well a domain's proposals are accepted.

Both use the Page–Hinkley test. The mix is tested by a likelihood ratio: how much better the mix of the last
dozen requests predicts the next request's domain than the mix since the last shift does. Its logarithm is negative on
average while nothing changes, whatever the order of domains. The distance to the nearest centroid would not do as a
signal: it stays small when traffic returns to a known domain, and rises for single outliers.

State is plain numbers and strings: a test is rebuilt from the values that it has seen.

Leaves out which domain a request has (modules/domains/detector.py).
"""

from __future__ import annotations

import math
from typing import Any, Literal

from aurora_lit.modules.domains.page_hinkley import PageHinkley

_MIN_VALUES = 16
"""Values before a change can be detected."""
_MAX_VALUES = 512
"""At so many values a test forgets the older half, so that the saved state stays small."""


class PageHinkleyTest:
    """A one-sided Page–Hinkley test that can be saved.

    >>> test = PageHinkleyTest(mode="up", tolerance=0.3, threshold=6.0)
    >>> test.update(0.1)                # True when the mean has risen; the test then starts anew
    """

    def __init__(self, *, mode: Literal["up", "down"], tolerance: float, threshold: float) -> None:
        """mode: "up" or "down", the direction of changes to detect. tolerance: change of the mean that is ignored.
        threshold: sum of the deviations beyond it at which a change is detected."""
        self._settings: Any = {"mode": mode, "delta": tolerance, "threshold": threshold}
        self.restore([])

    def update(self, value: float) -> bool:
        """Add a value; True if a change is detected with it."""
        self._values.append(value)
        changed = self._detector.update(value)
        if changed:
            self.restore([])
        elif len(self._values) >= _MAX_VALUES:
            self.restore(self._values[_MAX_VALUES // 2 :])
        return changed

    def restore(self, values: list[float]) -> None:
        """Set the state to that after these values."""
        self._values = list(values)
        self._detector = PageHinkley(min_instances=_MIN_VALUES, alpha=1.0, **self._settings)
        for value in self._values:
            self._detector.update(value)

    @property
    def values(self) -> list[float]:
        """The values that `restore` needs."""
        return list(self._values)


_MIN_REQUESTS = 48
"""Requests before a shift of the mix can be detected: while clusters form, everything is new."""
_RECENT_REQUESTS, _REFERENCE_REQUESTS = 12, 200
"""Memory of the recent mix and of the one it is compared with."""
_UNSEEN_PROBABILITY = 0.05
"""Probability that both mixes reserve for domains that they have not seen, together."""


class DomainMix:
    """Shares of domains in the last requests: a plain mean until the memory is full, an exponential one after."""

    def __init__(self, memory_requests: int) -> None:
        self._memory_requests = memory_requests
        self.num_requests = 0
        self.shares: dict[str, float] = {}

    def add(self, domain: str) -> None:
        """Count a request."""
        self.num_requests += 1
        rate = max(1 / self.num_requests, 1 / self._memory_requests)
        kept = {name: share * (1 - rate) for name, share in self.shares.items() if share > 1e-4 or name == domain}
        self.shares = {**kept, domain: kept.get(domain, 0.0) + rate}

    def probability(self, domain: str, *, num_domains: int) -> float:
        """Predicted probability that the next request is of this domain."""
        return (1 - _UNSEEN_PROBABILITY) * self.shares.get(domain, 0.0) + _UNSEEN_PROBABILITY / num_domains


class MixShiftDetector:
    """Detects that the mix of domains has changed; see the file's docstring."""

    def __init__(self) -> None:
        self._recent, self._reference = DomainMix(_RECENT_REQUESTS), DomainMix(_REFERENCE_REQUESTS)
        self._num_requests = 0
        self._test = PageHinkleyTest(mode="up", tolerance=0.3, threshold=6.0)

    @property
    def shares(self) -> dict[str, float]:
        """The recent mix."""
        return dict(self._recent.shares)

    def update(self, domain: str, *, num_domains: int) -> str | None:
        """Add a request; at a shift, the domain whose share has grown most, else None."""
        self._num_requests += 1
        recent = self._recent.probability(domain, num_domains=num_domains)
        reference = self._reference.probability(domain, num_domains=num_domains)
        changed = self._num_requests > _MIN_REQUESTS and self._test.update(math.log(recent / reference))
        self._recent.add(domain)
        if not changed:
            self._reference.add(domain)
            return None
        growth = {name: share - self._reference.shares.get(name, 0.0) for name, share in self._recent.shares.items()}
        self._reference = DomainMix(_REFERENCE_REQUESTS)
        return max(growth, key=lambda name: growth[name])

    def merge(self, removed: str, kept: str) -> None:
        """Count the requests of one domain as those of another."""
        for mix in (self._recent, self._reference):
            if removed in mix.shares:
                mix.shares[kept] = mix.shares.get(kept, 0.0) + mix.shares.pop(removed)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "recent": [self._recent.num_requests, dict(self._recent.shares)],
            "reference": [self._reference.num_requests, dict(self._reference.shares)],
            "num_requests": self._num_requests,
            "values": self._test.values,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        for mix, (num_requests, shares) in ((self._recent, state["recent"]), (self._reference, state["reference"])):
            mix.num_requests, mix.shares = num_requests, dict(shares)
        self._num_requests = state["num_requests"]
        self._test.restore(state["values"])


_LATEST_REQUESTS, _MEAN_REQUESTS = 4, 128
"""Memory of a domain's latest acceptance rate and of the mean that it is compared with."""


class AcceptanceDropDetector:
    """Detects that the draft's acceptance rate in one domain has dropped.

    The test is on the residual against a mean that follows the draft's progress. A rise is not reported.
    """

    def __init__(self) -> None:
        self._num_requests = 0
        self.mean = self._latest = 0.0
        """`mean`: the acceptance rate that is expected of the next request."""
        self._test = PageHinkleyTest(mode="down", tolerance=0.05, threshold=2.0)

    def update(self, acceptance: float) -> float:
        """Add a request's acceptance rate; at a drop, its size as a share of the mean, else 0."""
        residual = acceptance - self.mean if self._num_requests else 0.0
        self._num_requests += 1
        self.mean += max(1 / self._num_requests, 1 / _MEAN_REQUESTS) * (acceptance - self.mean)
        self._latest += max(1 / self._num_requests, 1 / _LATEST_REQUESTS) * (acceptance - self._latest)
        if not self._test.update(residual):
            return 0.0
        drop = max(0.0, 1 - self._latest / max(self.mean, 1e-6))
        self.mean, self._num_requests = self._latest, _LATEST_REQUESTS
        return drop

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "num_requests": self._num_requests,
            "mean": self.mean,
            "latest": self._latest,
            "values": self._test.values,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._num_requests, self.mean, self._latest = state["num_requests"], state["mean"], state["latest"]
        self._test.restore(state["values"])
