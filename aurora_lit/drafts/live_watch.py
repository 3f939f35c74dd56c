"""Detects, soon after a swap and on live traffic, that the new draft is right less often than the last one.

An observation is a first choice of the draft after first choices that were all right, in a sequence's round (n-gram
lookup does not count): whether it is the token that came, proposed or not. It is compared with how
often those of the previous version, or of the last one with enough of such traffic, were right in the same kind of
traffic and at the same place of a round's chain: how many tokens are drafted and proposed changes with load, with
acceptance and with how sure the draft is, and traffic changes its mix of domains, temperatures, grammars and options,
none of which makes a draft a worse one. A version is bad when it has been wrong many more times and the share of its
choices that were right is lower beyond noise. Rounds of one request are alike, so noise is estimated from whole
requests, of both versions. A version is on trial once, in its first rounds, and only until their mean shows that it is
no worse: a bad draft is bad from its first round on, later changes are due to traffic. Leaves out the rollback itself
(drafts/hot_reload.py) and the gate before publishing (learn/online/gate.py).

    watch = LiveWatch()
    watch.swapped(trusted=False)                                            # the trial of a new version begins
    verdict = watch.observe(request="a1", traffic=TrafficKind("code"), proposed=4, accepted=0)  # None, or the reason
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

TRIAL_ROUNDS = 2048
"""Length of a trial at most, rounds included that are not compared."""
_REMEMBERED_ROUNDS = 2048
"""The next version is compared with the observations of this many of the latest rounds."""
_MOST_SWAPS = 4
"""After so many swaps a mean of traffic that has not come since is forgotten: drafts and traffic have changed."""
_FEWEST_EXPECTED = 32
"""Fewest observations of the previous version for a mean to be used."""
_FEWEST_REQUESTS = 4
"""Fewest requests for a mean to be used, of either version: noise is not known from fewer."""
_FEWEST_ROUNDS = 16
"""Fewest rounds before a version can be rolled back; it is judged again after as many more."""
_TOLERATED_DROP = 0.03
"""By how much the share of right choices may fall, a tenth of an accepted token a round of a chain of four: traffic
cannot resolve smaller drops, the gate can."""
_LOST = 3.0
"""A version is bad once so many more of its choices were wrong than the tolerated drop makes wrong …"""
_NOISE = 3.8
"""… and its mean drop exceeds the tolerated one by this many standard errors."""
_ACQUITTAL_ROUNDS = 256
"""Fewest rounds before a version is found to be no worse."""
_ACQUITTAL_NOISE = 1.0
"""The mean drop must then be smaller than the tolerated one by this many standard errors."""


class TrafficKind(NamedTuple):
    """What makes a draft right more or less often, however good it is: only rounds that agree in it are compared."""

    domain: str = ""
    """What the request is served as."""
    temperature: float = 0.0
    """The request's, to a tenth; 0: greedy."""
    has_grammar: bool = False
    """True if a grammar constrains the answer."""
    has_options: bool = False
    """True if penalties, a bias, top-k, top-p or min-p change the target's distribution; the draft knows of none."""


_Kind = tuple[TrafficKind, int]
"""The traffic, and number of first choices before it in the round."""


@dataclass(frozen=True)
class _Round:
    """One sequence's round."""

    request: str
    traffic: TrafficKind
    right: list[bool]
    """Of the draft's first choices that the answer tells about: right ones, then at most one that was wrong."""


class LiveWatch:
    """The trials of one version after another; see the file's example."""

    def __init__(self) -> None:
        """No trial runs before the first swap."""
        self._latest: deque[_Round] = deque(maxlen=_REMEMBERED_ROUNDS)
        self._baseline = _Baseline(())
        self._on_trial = self._was_bad = False

    def swapped(self, *, trusted: bool) -> None:
        """Another version proposes from now on. trusted: it was served before, so there is no trial."""
        # A bad version is rolled back now, or has been replaced by a newer one meanwhile.
        if not trusted and not self._was_bad:
            self._baseline = _Baseline(self._latest, older=self._baseline)
        self._on_trial = bool(self._baseline.mean_by_kind) and not trusted
        self._number_by_kind: Counter[_Kind] = Counter()
        self._number_by_request: Counter[str] = Counter()
        self._num_rounds = self._num_compared = 0
        self._total_by_request: dict[str, float] = defaultdict(float)
        """Right choices minus expected ones."""
        self._squares = 0.0
        self._was_bad = False
        self._latest.clear()

    def observe(self, *, request: str, traffic: TrafficKind, proposed: int, accepted: int) -> str | None:
        """Add one sequence's round. Returns the reason if the version on trial is bad, which ends its trial.

        proposed: first choices that the answer tells about if all before them are right; accepted: that were right, up
        to the first that was not.
        """
        right = [True] * accepted + [False] * (accepted < proposed)
        self._latest.append(_Round(request, traffic, right))
        if not self._on_trial:
            return None
        self._num_rounds += 1
        self._on_trial = self._num_rounds <= TRIAL_ROUNDS
        if not self._on_trial or (traffic, 0) not in self._baseline.mean_by_kind:
            return None
        for place, is_right in enumerate(right):
            expected = self._baseline.mean_by_kind.get((traffic, place))
            if expected is None:
                break
            self._number_by_kind[traffic, place] += 1
            self._number_by_request[request] += 1
            self._total_by_request[request] += is_right - expected
            self._squares += (is_right - expected) ** 2
        self._num_compared += 1
        if self._num_compared % _FEWEST_ROUNDS:
            return None
        number = self._number_by_kind.total()
        mean, error = self._mean_and_error(number)
        lost = -number * (mean + _TOLERATED_DROP)
        bad = lost > _LOST and mean + _NOISE * error < -_TOLERATED_DROP
        good = self._num_compared >= _ACQUITTAL_ROUNDS and mean - _ACQUITTAL_NOISE * error > -_TOLERATED_DROP
        self._on_trial = not bad and not good
        self._was_bad |= bad
        if not bad:
            return None
        return f"{-mean:.0%} fewer of its tokens were right than of the version before, in {self._num_compared} rounds"

    def _mean_and_error(self, number: int) -> tuple[float, float]:
        """The mean difference, and its standard error: of the new choices' mean, and of the means it is compared with.

        With few requests their spread alone would often be too small by chance; choices are then taken to be as alike
        within a request as those before the swap.
        """
        mean = sum(self._total_by_request.values()) / number
        by_request = _variance_of_sum(
            total - mean * self._number_by_request[request] for request, total in self._total_by_request.items()
        )
        by_round = (self._squares - number * mean * mean) * self._baseline.excess_of_requests
        share_by_kind = {kind: count / number for kind, count in self._number_by_kind.items()}
        variance = max(by_request, by_round) / number**2 + self._baseline.variance(share_by_kind)
        return mean, math.sqrt(variance)


class _Baseline:
    """How often choices of earlier versions were right, by kind: of the latest one that had enough of it."""

    def __init__(self, rounds: Iterable[_Round], *, older: _Baseline | None = None) -> None:
        """`older`: what holds for kinds of which there are too few rounds."""
        values: dict[_Kind, list[tuple[str, bool]]] = defaultdict(list)
        for each in rounds:
            for place, is_right in enumerate(each.right):
                values[each.traffic, place].append((each.request, is_right))
        self.mean_by_kind: dict[_Kind, float] = {}
        self._shift_by_kind: dict[_Kind, dict[str, float]] = {}
        """By kind and request: by how much the request's choices shift the mean."""
        self._age_by_kind: dict[_Kind, int] = {}
        """Swaps since the mean was taken, after the first."""
        squares, sums = 0.0, list[float]()
        for kind, of_kind in values.items():
            if len(of_kind) < _FEWEST_EXPECTED or len({request for request, _ in of_kind}) < _FEWEST_REQUESTS:
                continue
            mean = sum(value for _, value in of_kind) / len(of_kind)
            shifts: dict[str, float] = defaultdict(float)
            for request, value in of_kind:
                shifts[request] += (value - mean) / len(of_kind)
                squares += (value - mean) ** 2
            sums += [shift * len(of_kind) for shift in shifts.values()]
            self.mean_by_kind[kind], self._shift_by_kind[kind] = mean, shifts
            self._age_by_kind[kind] = 0
        self.excess_of_requests = max(1.0, _variance_of_sum(sums) / squares) if squares else 1.0
        """The variance of a mean over whole requests, as a multiple of that of as many unrelated choices."""
        if older is not None:
            self._complete(older)

    def _complete(self, older: _Baseline) -> None:
        """Take over what is known of other kinds."""
        if not self.mean_by_kind:
            self.excess_of_requests = older.excess_of_requests
        for kind, age in older._age_by_kind.items():
            if kind not in self.mean_by_kind and age < _MOST_SWAPS:
                self.mean_by_kind[kind] = older.mean_by_kind[kind]
                self._shift_by_kind[kind] = older._shift_by_kind[kind]
                self._age_by_kind[kind] = age + 1

    def variance(self, share_by_kind: dict[_Kind, float]) -> float:
        """The squared standard error of the mean that is expected of choices of these kinds."""
        shift_by_request: dict[str, float] = defaultdict(float)
        for kind, share in share_by_kind.items():
            for request, shift in self._shift_by_kind[kind].items():
                shift_by_request[request] += share * shift
        return _variance_of_sum(shift_by_request.values())


def _variance_of_sum(sum_by_request: Iterable[float]) -> float:
    """The variance of the sum over requests, from their sums' squares (cluster-robust; Liang and Zeger 1986)."""
    sums = list(sum_by_request)
    if len(sums) < _FEWEST_REQUESTS:
        return math.inf
    return sum(each * each for each in sums) * len(sums) / (len(sums) - 1)
