"""Detects, soon after a swap and on live traffic, that fewer tokens of the new draft are accepted than of the last one.

An observation is one sequence's round with proposals of the draft (n-gram lookup and exploring rounds do not count). It
is compared with the mean accepted length of the previous version for as many proposals in the same domain: the number
of proposals changes with load and acceptance, and traffic changes its mix of domains, neither of which is due to the
draft. A Page–Hinkley test watches the differences. When it signals a drop, the mean over all rounds of the new
version must show the drop as well, beyond noise. A version is on trial once, in its first rounds, and only until their
mean shows that it is no worse: a bad draft is bad from its first round on, later changes are due to traffic. Leaves out
the rollback itself (drafts/hot_reload.py) and the gate before publishing (learn/online/gate.py).

    watch = RollbackWatch()
    watch.swapped(trusted=False)                                            # the trial of a new version begins
    verdict = watch.observe(domain="code", proposed=4, accepted=0)          # None, or the reason for a rollback
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from aurora_lit.modules.domains.page_hinkley import PageHinkley

TRIAL_ROUNDS = 2048
"""Length of a trial at most, in observations."""
_REMEMBERED_ROUNDS = 2048
"""The next version is compared with this many of the latest observations. Rounds of one request are alike: 512 were a
dozen requests of one client, whose mean was noise."""
_FEWEST_EXPECTED = 32
"""Fewest observations of the previous version for a mean to be used."""
_FEWEST_ROUNDS = 16
"""Fewest observations before a version can be rolled back."""
_QUIET_ROUNDS = 256
"""Observations without a difference that start the Page–Hinkley test."""
_TOLERATED_DROP_TOKENS = 0.15
"""Accepted tokens a round that a version may lose: traffic cannot resolve smaller drops, the gate can."""
_THRESHOLD_TOKENS = 15.0
"""Threshold of the Page–Hinkley test: accepted tokens lost in total, beyond the tolerated drop."""
_NOISE = 4.0
"""The mean drop must exceed the tolerated one by this many standard errors."""
_ACQUITTAL_ROUNDS = 256
"""Fewest observations before a version is found to be no worse."""
_ACQUITTAL_NOISE = 2.0
"""The mean drop must then be smaller than the tolerated one by this many standard errors."""


@dataclass(kw_only=True)
class _Moments:
    """Number, sum and sum of squares of values."""

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
    """The trials of one version after another; see the file's example."""

    def __init__(self) -> None:
        """No trial runs before the first swap."""
        self._latest: deque[tuple[str, int, int]] = deque(maxlen=_REMEMBERED_ROUNDS)
        self._expected: dict[tuple[str, int], float] = {}
        self._on_trial = self._alarmed = False

    def swapped(self, *, trusted: bool) -> None:
        """Another version proposes from now on. trusted: it was served before, so there is no trial."""
        expected = _means(self._latest)
        # Keep the older expectation if the last version had too few rounds, or was bad and is rolled back now.
        if expected and not trusted:
            self._expected = expected
        self._on_trial, self._alarmed = bool(self._expected) and not trusted, False
        self._differences = _Moments()
        self._detector = _detector()
        self._latest.clear()

    def observe(self, *, domain: str, proposed: int, accepted: int) -> str | None:
        """Add one sequence's round. Returns the reason if the version on trial is bad, which ends its trial."""
        self._latest.append((domain, proposed, accepted))
        expected = self._expected.get((domain, proposed))
        if not self._on_trial or expected is None:
            return None
        self._differences.add(accepted - expected)
        self._alarmed |= self._detector.update(accepted - expected)
        number, mean, error = self._differences.number, self._differences.mean, self._differences.standard_error
        bad = self._alarmed and number >= _FEWEST_ROUNDS and mean + _NOISE * error < -_TOLERATED_DROP_TOKENS
        good = number >= _ACQUITTAL_ROUNDS and mean - _ACQUITTAL_NOISE * error > -_TOLERATED_DROP_TOKENS
        self._on_trial = not bad and not good and number < TRIAL_ROUNDS
        if not bad:
            return None
        return f"it accepted {-mean:.2f} tokens a round less than the version before, over {number} rounds"


def _detector() -> PageHinkley:
    """A Page–Hinkley test that has seen a series without differences, so that it has a baseline."""
    detector = PageHinkley(
        min_instances=_FEWEST_ROUNDS, delta=_TOLERATED_DROP_TOKENS, threshold=_THRESHOLD_TOKENS, mode="down"
    )
    for _ in range(_QUIET_ROUNDS):
        detector.update(0.0)
    return detector


def _means(observations: Iterable[tuple[str, int, int]]) -> dict[tuple[str, int], float]:
    """Mean accepted tokens of the first k proposals, by (domain, k), from all rounds with at least k proposals."""
    sums: dict[tuple[str, int], _Moments] = {}
    for domain, proposed, accepted in observations:
        for count in range(1, proposed + 1):
            sums.setdefault((domain, count), _Moments()).add(min(accepted, count))
    return {kind: each.mean for kind, each in sums.items() if each.number >= _FEWEST_EXPECTED}
