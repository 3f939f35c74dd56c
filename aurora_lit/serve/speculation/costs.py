"""What operations cost on this machine, by batch size and query length: measured at start, updated by running rounds.

The measurements at start are best cases: empty slots, and no other work on the machine. Rounds then measure only what
is chosen. So an operation that no round has measured yet is assumed to be slower than at start by the same factor as
the measured ones; otherwise a planner would always prefer the operations it knows least about.

Left out: choosing (serve/speculation/planner.py) and the measurements at start (serve/speculation/calibration.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_DECAY, _DRIFT_DECAY = 0.9, 0.95
"""Weight of the old cost, and drift, when a round measures a new one; less for the first rounds (`_weight`), or a short
answer ends before what it costs is known."""
_MAX_DRIFT = 4.0
_MOST_RISE = 1.5
"""A round counts as at most so often what was expected: a longer one was preempted, or the first of its kind."""

_Key = tuple[int, int]
"""(batch size, query length)."""


class CostTable:
    """Seconds of an operation by batch size and query length; interpolated between measurements.

    >>> table.set_initial(8, 5, 0.020)
    >>> table.update(8, 1, 0.012)
    >>> table(8, 5)
    """

    def __init__(self) -> None:
        self._measured: dict[_Key, float] = {}
        """Seconds, by running rounds."""
        self._num_rounds: Counter[_Key] = Counter()
        self._initial: dict[_Key, float] = {}
        """Seconds, by the calibration."""
        self._interpolations: dict[tuple[int, float], tuple[_Key, _Key, float]] = {}
        """For what was not measured: two measured neighbours, and the weight of the second."""
        self._drift = 1.0
        """Running mean of measured seconds over initial seconds."""

    def set_initial(self, batch_size: int, query_length: int, seconds: float) -> None:
        """Store a measurement of the calibration."""
        self._initial[batch_size, query_length] = seconds
        self._interpolations.clear()

    def initial(self, batch_size: int, query_length: int) -> float:
        """The calibration's measurement; 0 if there is none."""
        return self._initial.get((batch_size, query_length), 0.0)

    @property
    def all_initial(self) -> list[tuple[int, int, float]]:
        """The calibration's measurements: batch size, query length, seconds."""
        return [(*key, seconds) for key, seconds in self._initial.items()]

    def update(self, batch_size: int, query_length: float, seconds: float) -> None:
        """Update by a measurement of a round. Outliers (a preempted process) change little.

        `query_length` is the mean over the batch. A measurement between two whole numbers is scaled to the nearer one.
        """
        key = batch_size, max(1, round(query_length))
        expected = self(batch_size, query_length)
        if key[1] != query_length and expected:
            seconds *= self(*key) / expected
        initial = self._initial.get(key)
        old = self._known(key) if key in self._measured or initial is not None else seconds
        seconds = min(seconds, _MOST_RISE * old)
        if initial:
            weight = _weight(self._num_rounds.total(), _DRIFT_DECAY)
            self._drift += weight * (min(seconds / initial, _MAX_DRIFT) - self._drift)
        if key not in self._measured:
            self._interpolations.clear()
        self._measured[key] = old + _weight(self._num_rounds[key], _DECAY) * (seconds - old)
        self._num_rounds[key] += 1

    def __call__(self, batch_size: int, query_length: float) -> float:
        """Expected seconds; 0 before any measurement. `query_length` may be a mean, so no whole number."""
        key = batch_size, int(query_length)
        if key[1] == query_length and (key in self._measured or key in self._initial):
            return self._known(key)
        if (batch_size, query_length) not in self._interpolations:
            if not self._initial and not self._measured:
                return 0.0
            self._interpolations[batch_size, query_length] = self._neighbours(batch_size, query_length)
        below, above, weight = self._interpolations[batch_size, query_length]
        return self._known(below) + weight * (self._known(above) - self._known(below))

    def _neighbours(self, batch_size: int, query_length: float) -> tuple[_Key, _Key, float]:
        """The nearest measured keys below and above, by number of query positions, and the weight of the upper one."""
        keys = self._initial.keys() | self._measured.keys()
        low = [key for key in keys if key[0] <= batch_size and key[1] <= query_length]
        high = [key for key in keys if key[0] >= batch_size and key[1] >= query_length]
        if not low or not high:
            nearest = min(keys, key=lambda key: abs(key[0] * key[1] - batch_size * query_length))
            return nearest, nearest, 0.0
        below = max(low, key=lambda key: key[0] * key[1])
        above = min(high, key=lambda key: key[0] * key[1])
        span = above[0] * above[1] - below[0] * below[1]
        return below, above, (batch_size * query_length - below[0] * below[1]) / span if span else 0.0

    def _known(self, key: _Key) -> float:
        measured = self._measured.get(key)
        return self._initial[key] * self._drift if measured is None else measured


def _weight(num_earlier: int, decay: float) -> float:
    """Of a new measurement, beside an initial one and `num_earlier` others."""
    return max(1 - decay, 1 / (num_earlier + 2))


class DraftShape(NamedTuple):
    """What the draft proposes for each sequence that it drafts for."""

    levels: int = 0
    """Length of a chain, or depth of a tree; 0: nothing is drafted."""
    nodes: int = 0
    """Tokens of a tree; 0: a chain."""

    @property
    def num_tokens(self) -> int:
        """Proposals of a sequence."""
        return self.nodes or self.levels


class Costs:
    """The costs of a round's parts, in seconds.

    >>> costs.round_s(8, [4, 0, 0, 0, 0, 0, 0, 2])    # the target's pass, verification and commit
    >>> costs.draft_s(2, DraftShape(levels=3, nodes=7))
    """

    def __init__(self, *, ragged: bool) -> None:
        """`ragged`: each sequence computes its own columns; else all compute as many as the one with most."""
        self.ragged = ragged
        self.target = CostTable()
        """Of a round but for drafting, by batch size and mean query length."""
        self.chain = CostTable()
        """Of drafting chains, the prefill of two positions included, by batch size and length."""
        self.tree = CostTable()
        """Of drafting trees, by batch size and number of levels."""
        self.prefill_position_s = 0.0
        """Of one position of the prefill of the draft's cache."""

    def round_s(self, batch_size: int, counts: Sequence[int]) -> float:
        """Of a round but for drafting; `counts`: proposals of those sequences that have some."""
        if not batch_size:
            return 0.0
        return self.target(batch_size, 1 + (sum(counts) / batch_size if self.ragged else max(counts, default=0)))

    def column_s(self, batch_size: int, num_proposals: int) -> float:
        """What one more proposal adds to a round in which one sequence has so many."""
        return max(0.0, self.round_s(batch_size, [num_proposals + 1]) - self.round_s(batch_size, [num_proposals]))

    def draft_s(self, num_drafting: int, shape: DraftShape) -> float:
        """Of drafting for some sequences."""
        if not shape.levels:
            return 0.0
        return (self.tree if shape.nodes else self.chain)(num_drafting, shape.levels)

    def observe_draft(self, num_drafting: int, shape: DraftShape, seconds: float, *, uncached: int) -> None:
        """Update by the time that drafting took, with the prefill of `uncached` positions."""
        seconds = max(0.0, seconds - uncached * self.prefill_position_s)
        table = self.tree if shape.nodes else self.chain
        if table(num_drafting, shape.levels):
            table.update(num_drafting, shape.levels, seconds)
