"""Notices that traffic changed: its mix of domains, or how well a domain's proposals are accepted. Page–Hinkley (river)
calls both.

The distance to the nearest centroid alone does not tell: it stays small when traffic returns to a known domain, and
rises for single odd requests. So the mix is watched by a likelihood ratio: how much better the mix of the last dozen
requests foretells the next one than the mix since the last shift does. It is below zero on average while nothing
changes, in whatever order domains alternate. What is left out: what a request's domain is (modules/domains/detector.py).

State is plain numbers and strings. A detector of river is not saved: it is told again what it was told.
"""

from __future__ import annotations

import math
from typing import Any

from river.drift import PageHinkley

_TOLD_AT_MOST = 512
"""Values after which a detector forgets the older half, so that what has to be saved stays small."""


class Watch:
    """Page–Hinkley, one-sided, that can be saved.

    >>> watch = Watch(mode="up", tolerance=0.3, threshold=6.0)
    >>> watch.observe(0.1)              # True when the mean has risen; it begins anew then
    """

    def __init__(self, *, mode: str, tolerance: float, threshold: float) -> None:
        """tolerance: change of the mean that is borne; threshold: sum of what lies beyond it that is called."""
        self._settings: Any = {"mode": mode, "delta": tolerance, "threshold": threshold}
        self.restore([])

    def observe(self, value: float) -> bool:
        """Take in a value; whether it completes a change."""
        self._told.append(value)
        tell: Any = self._detector.update
        tell(value)
        changed = bool(self._detector.drift_detected)
        if changed:
            self.restore([])
        elif len(self._told) >= _TOLD_AT_MOST:
            self.restore(self._told[_TOLD_AT_MOST // 2 :])
        return changed

    def restore(self, told: list[float]) -> None:
        """Be as after these values."""
        self._told = list(told)
        self._detector: Any = PageHinkley(min_instances=_FEWEST, alpha=1.0, **self._settings)
        tell: Any = self._detector.update
        for value in self._told:
            tell(value)

    @property
    def told(self) -> list[float]:
        """What `restore` needs."""
        return list(self._told)


_FEWEST = 16
"""Values before a change can be called."""
_QUIET_REQUESTS = 48
"""Requests from which the first mix is learned before anything is called; while clusters form, all is new."""
_RECENT_REQUESTS, _REFERENCE_REQUESTS = 12, 200
"""Memory of the recent mix and of the one it is compared with."""
_UNFORESEEN = 0.05
"""Probability that both mixes keep for domains they have not seen, all together."""


class Mix:
    """Shares of domains in the last requests: exponential forgetting, a plain mean until its memory is full."""

    def __init__(self, memory_requests: int) -> None:
        self._memory_requests = memory_requests
        self.number = 0
        self.shares: dict[str, float] = {}

    def add(self, domain: str) -> None:
        """Count a request."""
        self.number += 1
        rate = max(1 / self.number, 1 / self._memory_requests)
        kept = {name: share * (1 - rate) for name, share in self.shares.items() if share > 1e-4 or name == domain}
        self.shares = {**kept, domain: kept.get(domain, 0.0) + rate}

    def probability(self, domain: str, *, num_domains: int) -> float:
        """That the next request is of this domain."""
        return (1 - _UNFORESEEN) * self.shares.get(domain, 0.0) + _UNFORESEEN / num_domains


class MixWatch:
    """Tells when the mix of domains has become another; see the file's docstring."""

    def __init__(self) -> None:
        self._recent, self._reference = Mix(_RECENT_REQUESTS), Mix(_REFERENCE_REQUESTS)
        self._seen = 0
        self._watch = Watch(mode="up", tolerance=0.3, threshold=6.0)

    @property
    def shares(self) -> dict[str, float]:
        """The recent mix."""
        return dict(self._recent.shares)

    def observe(self, domain: str, *, num_domains: int) -> str | None:
        """Take in a request's domain; at a shift, the domain whose share has grown most."""
        self._seen += 1
        recent = self._recent.probability(domain, num_domains=num_domains)
        reference = self._reference.probability(domain, num_domains=num_domains)
        changed = self._seen > _QUIET_REQUESTS and self._watch.observe(math.log(recent / reference))
        self._recent.add(domain)
        if not changed:
            self._reference.add(domain)
            return None
        growth = {name: share - self._reference.shares.get(name, 0.0) for name, share in self._recent.shares.items()}
        self._reference = Mix(_REFERENCE_REQUESTS)
        return max(growth, key=lambda name: growth[name])

    def rename(self, old: str, new: str) -> None:
        """Count requests of one domain, so far and in the mixes, as those of another."""
        for mix in (self._recent, self._reference):
            if old in mix.shares:
                mix.shares[new] = mix.shares.get(new, 0.0) + mix.shares.pop(old)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "recent": [self._recent.number, dict(self._recent.shares)],
            "reference": [self._reference.number, dict(self._reference.shares)],
            "seen": self._seen,
            "told": self._watch.told,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for mix, (number, shares) in ((self._recent, state["recent"]), (self._reference, state["reference"])):
            mix.number, mix.shares = number, dict(shares)
        self._seen = state["seen"]
        self._watch.restore(state["told"])


_LATEST_ACCEPTANCES, _ACCEPTANCES = 4, 128
"""Memory, in requests, of a domain's latest acceptance and of the mean that it is compared with."""


class AcceptanceWatch:
    """Tells when the draft's proposals in one domain are accepted less than they were.

    What is watched is the residual against a mean that follows the draft's progress; a rise is never called.
    """

    def __init__(self) -> None:
        self._number = 0
        self.mean = self._latest = 0.0
        """`mean` is what is expected of the next request."""
        self._watch = Watch(mode="down", tolerance=0.05, threshold=2.0)

    def observe(self, acceptance: float) -> float:
        """Take in a request's acceptance rate; at a drop, how large it is as a share of the mean, else 0."""
        residual = acceptance - self.mean if self._number else 0.0
        self._number += 1
        self.mean += max(1 / self._number, 1 / _ACCEPTANCES) * (acceptance - self.mean)
        self._latest += max(1 / self._number, 1 / _LATEST_ACCEPTANCES) * (acceptance - self._latest)
        if not self._watch.observe(residual):
            return 0.0
        drop = max(0.0, 1 - self._latest / max(self.mean, 1e-6))
        self.mean, self._number = self._latest, _LATEST_ACCEPTANCES
        return drop

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"number": self._number, "mean": self.mean, "latest": self._latest, "told": self._watch.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._number, self.mean, self._latest = state["number"], state["mean"], state["latest"]
        self._watch.restore(state["told"])
