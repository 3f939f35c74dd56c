"""What passes and draft steps take on this machine, by batch size and query length.

The start times a few of them side by side (serve/speculation/calibration.py), so it is known how they compare.
What other work, or long contexts, change since then is one factor for all passes and one for all chains, which running
rounds keep up to date. Each round also corrects the timed lengths that it lies between, slowly.

Left out: what a column is worth (serve/speculation/weigh.py).

All times are in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

READ_IN_A_STEP = 2
"""Positions that a sequence's first draft step reads: about what a round before it accepted."""

_MOST_SURPRISE = 0.3
"""A round counts as at most so much longer than expected: a longer one was preempted, or the first of its kind."""
_ROUND_WEIGHT = 1 / 16
"""Of one round in the factor; the first rounds weigh more."""
_LEAST_OWN_WEIGHT = 1 / 64
_TRUSTED_ROUNDS = 8
"""Of one round in the timed lengths that it lies between; as so many rounds the calibration counts there. Lengths that
rounds seldom have would otherwise never be corrected: all would follow those that they mostly have."""
_TIMED_CATCH_UP, _CATCH_UP_WEIGHT = 32, 0.2
"""Positions from which on a prefill of the draft's cache is a measure of what one takes, and none of the chain; and the
weight of one measurement."""


class CostTable:
    """Seconds of an operation by batch size and query length, interpolated between those that were timed.

    >>> table.set_initial(8, 5, 0.020)
    >>> table.update(8, 1, 0.012)
    >>> table(8, 5)
    """

    def __init__(self) -> None:
        self._initial: dict[int, dict[int, float]] = {}
        """Seconds by batch size and query length, as on a machine without other work."""
        self._num_rounds_at: dict[tuple[int, int], float] = {}
        """How many rounds have corrected them."""
        self._slowdown, self._num_rounds = 1.0, 0
        """How much longer rounds take now; and how many have said so."""
        self._interpolated: dict[tuple[int, float], float] = {}

    def set_initial(self, batch_size: int, query_length: int, seconds: float) -> None:
        """Store what the calibration has timed."""
        lengths = {**self._initial.get(batch_size, {}), query_length: seconds}
        self._initial[batch_size] = dict(sorted(lengths.items()))
        self._initial = dict(sorted(self._initial.items()))
        self._interpolated.clear()

    @property
    def all_initial(self) -> list[tuple[int, int, float]]:
        """Batch size, query length and seconds of all that was timed."""
        return [(size, length, s) for size, lengths in self._initial.items() for length, s in lengths.items()]

    def update(self, batch_size: int, query_length: float, seconds: float) -> None:
        """Update by a measurement of a round. Outliers (a preempted process) change little.

        `query_length` may be a mean over the batch, so no whole number. The first round of more or fewer sequences than
        any that were timed is taken as it is; that of a size between them starts from what is expected of it.
        """
        if not self._initial or not min(self._initial) <= batch_size <= max(self._initial):
            self.set_initial(batch_size, max(1, round(query_length)), seconds / self._slowdown)
        elif batch_size not in self._initial:
            lengths = sorted({each for timed in self._initial.values() for each in timed})
            self._initial[batch_size] = {each: self._between_sizes(batch_size, each) for each in lengths}
            self._initial = dict(sorted(self._initial.items()))
        expected = self(batch_size, query_length)
        if not (expected and seconds > 0):
            return
        surprise = max(-_MOST_SURPRISE, min(_MOST_SURPRISE, seconds / expected - 1))
        self._num_rounds += 1
        self._slowdown *= 1 + surprise * max(_ROUND_WEIGHT, 1 / (1 + self._num_rounds))
        own = self._initial[batch_size]
        for length, share in _shares(list(own), query_length):
            num_rounds = self._num_rounds_at.get((batch_size, length), 0.0)
            own[length] *= 1 + share * surprise * max(_LEAST_OWN_WEIGHT, 1 / (1 + _TRUSTED_ROUNDS + num_rounds))
            self._num_rounds_at[batch_size, length] = num_rounds + share
        self._interpolated.clear()

    def __call__(self, batch_size: int, query_length: float) -> float:
        """Expected seconds; 0 before any measurement. `query_length` may be a mean, so no whole number."""
        key = batch_size, query_length
        if key not in self._interpolated:
            self._interpolated[key] = self._between_sizes(batch_size, query_length)
        return self._interpolated[key] * self._slowdown

    def _between_sizes(self, batch_size: int, query_length: float) -> float:
        if not self._initial:
            return 0.0
        sizes = list(self._initial)
        below = max((size for size in sizes if size <= batch_size), default=sizes[0])
        above = min((size for size in sizes if size >= batch_size), default=sizes[-1])
        low, high = (_on_curve(self._initial[size], query_length) for size in (below, above))
        return low + (high - low) * (batch_size - below) / (above - below) if above > below else low


def _on_curve(seconds_by_length: dict[int, float], length: float) -> float:
    """Linear between two lengths; beyond the longest as between the last two."""
    lengths = list(seconds_by_length)
    if len(lengths) == 1 or length <= lengths[-1]:
        return sum(share * seconds_by_length[each] for each, share in _shares(lengths, length))
    low, high = lengths[-2:]
    low_s, high_s = seconds_by_length[low], seconds_by_length[high]
    return high_s + max(0.0, high_s - low_s) * (length - high) / (high - low)


def _shares(lengths: Sequence[int], length: float) -> list[tuple[int, float]]:
    """The lengths about this one, and how near they are; the last or first one beyond them."""
    above = next((each for each in lengths if each >= length), lengths[-1])
    at = lengths.index(above)
    if not at or length >= above:
        return [(above, 1.0)]
    below = lengths[at - 1]
    share = (length - below) / (above - below)
    return [(below, 1 - share), (above, share)]


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
        """Of one position of the prefill of the draft's cache."""

    def round_s(self, batch_size: int, counts: Sequence[int]) -> float:
        """Of a round but for drafting; `counts`: proposals of those sequences that have some."""
        return self.target(batch_size, self._query_length(batch_size, counts)) if batch_size else 0.0

    def observe_round(self, batch_size: int, counts: Sequence[int], seconds: float) -> None:
        """Update by a round's time but for drafting; `counts` as in `round_s`."""
        self.target.update(batch_size, self._query_length(batch_size, counts), seconds)

    def _query_length(self, batch_size: int, counts: Sequence[int]) -> float:
        """The mean over the batch; if rows are padded, that of the longest row."""
        return 1 + (sum(counts) / batch_size if self.ragged else max(counts, default=0))

    def draft_s(self, num_drafting: int, length: int) -> float:
        """Of drafting chains for some sequences."""
        return self.chain(num_drafting, length) if length else 0.0

    def catch_up_s(self, num_drafting: int, *, uncached: int) -> float:
        """Of the prefill of `uncached` positions beyond those that the first step of each sequence reads anyway."""
        return max(0, uncached - READ_IN_A_STEP * num_drafting) * self.prefill_position_s

    def observe_draft(self, num_drafting: int, length: int, seconds: float, *, uncached: int) -> None:
        """Update by the time that drafting took, with the prefill of `uncached` positions; `length` 0: that alone."""
        chain_s, beyond = self.draft_s(num_drafting, length), uncached - READ_IN_A_STEP * num_drafting
        if length and not chain_s:
            return
        if beyond >= _TIMED_CATCH_UP and self.prefill_position_s:
            position_s = min(max(0.0, seconds - chain_s) / beyond, 2 * self.prefill_position_s)
            self.prefill_position_s += _CATCH_UP_WEIGHT * (position_s - self.prefill_position_s)
        elif length:
            self.chain.update(num_drafting, length, seconds - self.catch_up_s(num_drafting, uncached=uncached))
