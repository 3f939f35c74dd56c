"""Notices that a new draft accepts less than the one before it, on live traffic, soon after a swap.

An observation is one row's round with proposals of the draft (not of lookup, not an exploring one), as the difference
from what the version before accepted on average of as many proposals in the same domain: the number of proposals
changes with load and acceptance, and traffic changes its mix of labelled domains; neither is the draft's fault.
Page–Hinkley (river) watches the differences; once it has called a drop, that drop must also show, beyond noise, in the
mean over all rounds of the new version. A version has to stand this trial once, in its first rounds; what happens later
is the traffic's doing. Leaves out going back (publishing.py, serve/worker/hot_reload.py) and the gate before publishing.

    watch = RollbackWatch()
    watch.swapped(trusted=False)                                            # the trial of a new version begins
    verdict = watch.observe(domain="code", proposed=4, accepted=0)          # None, until it is called bad: why
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from river.drift import PageHinkley

TRIAL_ROUNDS = 2048
"""Observations in which a new version is on trial."""
_REMEMBERED_ROUNDS = 512
"""Latest observations of a version that the next one is compared with."""
_FEWEST_EXPECTED = 32
"""Observations of the version before from which their mean counts."""
_FEWEST_ROUNDS = 16
"""Observations before a version is called bad."""
_QUIET_ROUNDS = 256
"""Rounds without a difference that Page–Hinkley is told before a trial."""
_TOLERATED_DROP_TOKENS = 0.15
"""Accepted tokens a round that a version may lose without being called bad: the gate judges finer than traffic can."""
_THRESHOLD_TOKENS = 15.0
"""Page–Hinkley's threshold: accepted tokens lost in all, beyond what is tolerated."""
_NOISE = 4.0
"""Standard errors that the mean drop must be away from what is tolerated."""


@dataclass(kw_only=True)
class _Sum:
    """Number, sum and sum of squares."""

    number: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.number += 1
        self.total += value
        self.squares += value * value

    @property
    def mean(self) -> float:
        return self.total / self.number

    @property
    def standard_error(self) -> float:
        variance = max(0.0, self.squares / self.number - self.mean**2)
        return math.sqrt(variance / self.number)


class RollbackWatch:
    """One version's trial after another; see the file's example."""

    def __init__(self) -> None:
        """Nothing is on trial before the first swap."""
        self._latest: deque[tuple[str, int, int]] = deque(maxlen=_REMEMBERED_ROUNDS)
        self._expected: dict[tuple[str, int], float] = {}
        self._on_trial = self._alarmed = False

    def swapped(self, *, trusted: bool) -> None:
        """Another version proposes from now on; a trusted one (served before) is not tried again."""
        expected = _means(self._latest)
        # With too few rounds, the version before is no measure; nor is it when it was bad, and this one is back.
        if expected and not trusted:
            self._expected = expected
        self._on_trial, self._alarmed = bool(self._expected) and not trusted, False
        self._differences = _Sum()
        self._detector = _detector()
        self._latest.clear()

    def observe(self, *, domain: str, proposed: int, accepted: int) -> str | None:
        """Take in one row's round; a sentence when the version on trial is bad, which ends its trial."""
        self._latest.append((domain, proposed, accepted))
        expected = self._expected.get((domain, proposed))
        if not self._on_trial or expected is None:
            return None
        self._differences.add(accepted - expected)
        self._detector.update(accepted - expected)
        self._alarmed |= self._detector.drift_detected
        number, mean = self._differences.number, self._differences.mean
        bad = (
            self._alarmed
            and number >= _FEWEST_ROUNDS
            and mean + _NOISE * self._differences.standard_error < -_TOLERATED_DROP_TOKENS
        )
        self._on_trial = not bad and number < TRIAL_ROUNDS
        if not bad:
            return None
        return f"it accepted {-mean:.2f} tokens a round less than the version before, over {number} rounds"


def _detector() -> Any:
    """Page–Hinkley that has already seen a while of no difference: what a drop would be from."""
    detector: Any = PageHinkley(
        min_instances=_FEWEST_ROUNDS, delta=_TOLERATED_DROP_TOKENS, threshold=_THRESHOLD_TOKENS, mode="down"
    )
    update: Any = detector.update
    for _ in range(_QUIET_ROUNDS):
        update(0.0)
    return detector


def _means(observations: Iterable[tuple[str, int, int]]) -> dict[tuple[str, int], float]:
    """Mean accepted tokens of the first k proposals, by domain and k, from all rounds with at least k."""
    sums: dict[tuple[str, int], _Sum] = {}
    for domain, proposed, accepted in observations:
        for count in range(1, proposed + 1):
            sums.setdefault((domain, count), _Sum()).add(min(accepted, count))
    return {kind: each.mean for kind, each in sums.items() if each.number >= _FEWEST_EXPECTED}
