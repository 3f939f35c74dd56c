"""What operations cost on this machine, by batch size and query length: measured at start, updated by running rounds.

The calibration measures all operations side by side, so it knows how they compare on an idle machine. What other work
changes is not one factor: neighbours that read memory slow down what every operation does once (it reads the weights),
neighbours that compute slow down what grows with the columns. Rounds therefore update two factors, of the shortest
operation and of what longer ones take beyond it, by a Kalman filter (R. E. Kalman, A new approach to linear filtering
and prediction problems, 1960). Both apply to operations that no round has measured. Each operation also has a factor of
its own, learned slowly, since a single round of a rare operation may have been disturbed.

Left out: choosing (serve/speculation/planner.py) and the measurements at start (serve/speculation/calibration.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

READ_IN_A_STEP = 2
"""Positions that a sequence's first draft step reads: about what a round before it accepted."""

_NOISE = 0.1
"""Standard deviation of a round's time over what was expected."""
_MOST_SURPRISE = 3 * _NOISE
"""A round counts as at most so much longer than expected: a longer one was preempted, or the first of its kind."""
_UNSURE = (0.2, 0.3)
"""Standard deviations of the two factors at the start."""
_CHANGE = (0.006, 0.01)
"""By how much the factors change from a round to the next, as standard deviations."""
_MOST_UNSURE = 0.6
"""Most standard deviation of the growing factor: rounds without proposals say nothing of it, however many they are."""
_TOGETHER = 0.7
"""Correlation of the two, at the start and of their changes: often other work slows down both."""
_OWN_WEIGHT, _OWN_PRIOR = 0.01, 16
"""Of a round in an operation's own factor; and how many rounds the calibration counts as."""
_TIMED_CATCH_UP, _CATCH_UP_WEIGHT = 64, 0.2
"""Positions from which on a prefill of the draft's cache is a measure of what one takes, and none of the chain; and the
weight of one measurement."""
_FORGOTTEN = 0.0005
"""Share that a round forgets of what was learned about that prefill, which decides whether any more is measured."""

_Key = tuple[int, int]
"""(batch size, query length)."""


def _covariance(deviations: tuple[float, float]) -> tuple[float, float, float]:
    fixed, growing = deviations
    return fixed**2, _TOGETHER * fixed * growing, growing**2


_UNSURE_VAR, _CHANGE_VAR = _covariance(_UNSURE), _covariance(_CHANGE)


class Slowdown:
    """How much longer operations take than at the start: their fixed part, and what grows with their length.

    All arguments are in units of what the calibration measured for the operation.
    """

    def __init__(self) -> None:
        self.fixed = self.growing = 1.0
        self._var = _UNSURE_VAR
        """Of the fixed factor, of both together, and of the growing one."""

    def __call__(self, grown: float) -> float:
        """Expected time of an operation of which the share `grown` grows with its length."""
        return self.fixed * (1 - grown) + self.growing * grown

    def update(self, grown: float, time: float) -> float:
        """Update by what such an operation took. Returns by which share that was more than expected, within limits."""
        f, g = 1 - grown, grown
        v_ff, v_fg, v_gg = (old + change for old, change in zip(self._var, _CHANGE_VAR, strict=True))
        kept = min(1.0, _MOST_UNSURE / v_gg**0.5)
        v_fg, v_gg = kept * v_fg, kept**2 * v_gg
        own_f, own_g = v_ff * f + v_fg * g, v_fg * f + v_gg * g
        expected = self(grown)
        total = own_f * f + own_g * g + (_NOISE * expected) ** 2
        surprise = max(-_MOST_SURPRISE, min(_MOST_SURPRISE, time / expected - 1))
        self.fixed = max(0.1, self.fixed + surprise * expected * own_f / total)
        self.growing = max(0.1, self.growing + surprise * expected * own_g / total)
        self._var = v_ff - own_f**2 / total, v_fg - own_f * own_g / total, v_gg - own_g**2 / total
        return surprise


class CostTable:
    """Seconds of an operation by batch size and query length; interpolated between measurements.

    >>> table.set_initial(8, 5, 0.020)
    >>> table.update(8, 1, 0.012)
    >>> table(8, 5)
    """

    def __init__(self) -> None:
        self._slowdown = Slowdown()
        self._initial: dict[_Key, float] = {}
        """Seconds, by the calibration, or by the first round of a key near which that measured nothing."""
        self._rough: set[_Key] = set()
        """Keys that later starts had better measure again: the latter's, and those that were timed too few times."""
        self._own: defaultdict[_Key, float] = defaultdict(lambda: 1.0)
        """What rounds of a key take over what is expected without this factor."""
        self._num_rounds: defaultdict[_Key, int] = defaultdict(int)
        self._parts: dict[tuple[int, float], tuple[float, float]] = {}
        """Initial seconds, interpolated, and the share of them that grows with the query length."""

    def set_initial(self, batch_size: int, query_length: int, seconds: float, *, is_rough: bool = False) -> None:
        """Store a measurement of the calibration. is_rough: it is used, but not worth keeping for later starts."""
        key = batch_size, query_length
        self._initial[key] = seconds
        (self._rough.add if is_rough else self._rough.discard)(key)
        self._parts.clear()

    def initial(self, batch_size: int, query_length: int) -> float:
        """The calibration's measurement; 0 if there is none."""
        return self._initial.get((batch_size, query_length), 0.0)

    @property
    def all_initial(self) -> list[tuple[int, int, float]]:
        """The calibration's measurements but for rough ones: batch size, query length, seconds."""
        return [(*key, seconds) for key, seconds in self._initial.items() if key not in self._rough]

    def update(self, batch_size: int, query_length: float, seconds: float) -> None:
        """Update by a measurement of a round. Outliers (a preempted process) change little.

        `query_length` may be a mean over the batch, so no whole number.
        """
        key = batch_size, max(1, round(query_length))
        if key not in self._initial and not self._lies_between(*key):
            self.set_initial(*key, seconds / self._slowdown(0.0), is_rough=True)
        initial, grown = self._part(batch_size, query_length)
        if not (initial and seconds > 0):
            return
        surprise = self._slowdown.update(grown, seconds / (initial * self._own[key]))
        self._own[key] *= 1 + surprise * max(_OWN_WEIGHT, 1 / (self._num_rounds[key] + _OWN_PRIOR))
        self._num_rounds[key] += 1

    def __call__(self, batch_size: int, query_length: float) -> float:
        """Expected seconds; 0 before any measurement. `query_length` may be a mean, so no whole number."""
        initial, grown = self._part(batch_size, query_length)
        return initial * self._slowdown(grown) * self._own.get((batch_size, round(query_length)), 1.0)

    def _part(self, batch_size: int, query_length: float) -> tuple[float, float]:
        key = batch_size, query_length
        if key not in self._parts:
            initial = self._interpolated(batch_size, query_length)
            shortest = min(self._interpolated(batch_size, 1), initial)
            self._parts[key] = initial, 1 - shortest / initial if initial else 0.0
        return self._parts[key]

    def _lies_between(self, batch_size: int, query_length: float) -> bool:
        below, above, _ = self._neighbours(batch_size, query_length)
        return below != above

    def _interpolated(self, batch_size: int, query_length: float) -> float:
        if not self._initial:
            return 0.0
        below, above, weight = self._neighbours(batch_size, query_length)
        return self._initial[below] + weight * (self._initial[above] - self._initial[below])

    def _neighbours(self, batch_size: int, query_length: float) -> tuple[_Key, _Key, float]:
        """The nearest known keys below and above, by number of query positions, and the weight of the upper one.

        The same key twice: that one, or the nearest if none is below or none above. Without any: the asked one.
        """
        asked = batch_size, int(query_length)
        keys = self._initial.keys()
        if not keys or (asked in keys and asked[1] == query_length):
            return asked, asked, 0.0
        low = [key for key in keys if key[0] <= batch_size and key[1] <= query_length]
        high = [key for key in keys if key[0] >= batch_size and key[1] >= query_length]
        if not low or not high:
            nearest = min(keys, key=lambda key: abs(key[0] * key[1] - batch_size * query_length))
            return nearest, nearest, 0.0
        below = max(low, key=lambda key: key[0] * key[1])
        above = min(high, key=lambda key: key[0] * key[1])
        span = above[0] * above[1] - below[0] * below[1]
        return below, above, (batch_size * query_length - below[0] * below[1]) / span if span else 0.0


class Costs:
    """The costs of a round's parts, in seconds.

    >>> costs.round_s(8, [4, 0, 0, 0, 0, 0, 0, 2])    # the target's pass, verification and commit
    >>> costs.draft_s(2, 3)                           # two chains of three
    """

    def __init__(self, *, ragged: bool) -> None:
        """`ragged`: each sequence computes its own columns; else all compute as many as the one with most."""
        self.ragged = ragged
        self.target = CostTable()
        """Of a round but for drafting, by batch size and query length (`_query_length`)."""
        self.chain = CostTable()
        """Of drafting chains, the prefill of READ_IN_A_STEP positions included, by batch size and length."""
        self.prefill_position_s = 0.0
        """Of one position of the prefill of the draft's cache, by the calibration."""
        self._prefill_slowdown = 1.0
        """How much longer a position takes now."""

    @property
    def catch_up_position_s(self) -> float:
        """Of one position of the prefill of the draft's cache, as it is now."""
        return self.prefill_position_s * self._prefill_slowdown

    def round_s(self, batch_size: int, counts: Sequence[int]) -> float:
        """Of a round but for drafting; `counts`: proposals of those sequences that have some."""
        if not batch_size:
            return 0.0
        return self.target(batch_size, self._query_length(batch_size, counts))

    def observe_round(self, batch_size: int, counts: Sequence[int], seconds: float) -> None:
        """Update by a round's time but for drafting; `counts` as in `round_s`."""
        self.target.update(batch_size, self._query_length(batch_size, counts), seconds)
        self._prefill_slowdown += _FORGOTTEN * (1 - self._prefill_slowdown)

    def _query_length(self, batch_size: int, counts: Sequence[int]) -> float:
        """The mean over the batch; if rows are padded, that of the longest row."""
        return 1 + (sum(counts) / batch_size if self.ragged else max(counts, default=0))

    def column_s(self, batch_size: int, num_proposals: int) -> float:
        """What one more proposal adds to a round in which one sequence has so many."""
        return max(0.0, self.round_s(batch_size, [num_proposals + 1]) - self.round_s(batch_size, [num_proposals]))

    def draft_s(self, num_drafting: int, length: int) -> float:
        """Of drafting chains for some sequences."""
        return self.chain(num_drafting, length) if length else 0.0

    def catch_up_s(self, num_drafting: int, *, uncached: int) -> float:
        """Of the prefill of `uncached` positions beyond those that the first step of each sequence reads anyway."""
        return max(0, uncached - READ_IN_A_STEP * num_drafting) * self.catch_up_position_s

    def observe_draft(self, num_drafting: int, length: int, seconds: float, *, uncached: int) -> None:
        """Update by the time that drafting took, with the prefill of `uncached` positions."""
        chain_s, beyond = self.chain(num_drafting, length), uncached - READ_IN_A_STEP * num_drafting
        if not chain_s:
            return
        if beyond >= _TIMED_CATCH_UP and self.prefill_position_s:
            self.observe_catch_up(beyond, seconds - chain_s)
            return
        seconds -= self.catch_up_s(num_drafting, uncached=uncached)
        self.chain.update(num_drafting, length, max(0.0, seconds))

    def observe_catch_up(self, num_positions: int, seconds: float) -> None:
        """Update by the time that the prefill of so many positions took alone; that of a few is no measure."""
        if num_positions < _TIMED_CATCH_UP or not self.prefill_position_s:
            return
        slowdown = max(0.1, seconds / (num_positions * self.prefill_position_s))
        change = min(slowdown, 2 * self._prefill_slowdown) - self._prefill_slowdown
        self._prefill_slowdown += _CATCH_UP_WEIGHT * change
