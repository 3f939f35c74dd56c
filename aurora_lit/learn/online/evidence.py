"""How much speaks for a challenger: an e-value over requests that it has not learned from, valid at any time.

A challenger is tried, learns on, and is tried again. With a t-test in each trial, equal drafts would pass in one of
them sooner or later. An e-value bets instead: it starts at 1, and each request multiplies it by 1 + λ·x, where x is how
far the challenger is ahead there, cut at ±MAX_CHANGE. If no challenger's cut change has a mean above 0 on the request
that comes next, the e-value is a nonnegative supermartingale, and the probability that it ever reaches 1/a is at most a
(Ville's inequality), however often it is looked at and however the challenger changes in between. Each request may be
bet on only once.

So the bound holds for equal drafts, whose changes are symmetric around 0, and not for all that are no better in the
mean: a draft that gains a little on most requests and loses a token a round on a few may pass.

Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, arXiv 2010.09686.
Leaves out which requests are bet on, and what else a draft needs to pass (learn/online/gate.py).
"""

from __future__ import annotations

import math

MAX_CHANGE = 0.3
"""A request counts with at most so many tokens a round, either way: a bet needs a bound."""
_BETS = (0.4, 0.8)
"""Shares of the wealth that the largest change could win or lose; half of the stake is bet at each."""
_MOST_LOG_WEALTH = 50.0
"""Wealth is capped here, which leaves the e-value valid: a draft that passes and cannot be published, as the disk is
full, goes on winning."""


class Evidence:
    """See the file's docstring.

    >>> evidence = Evidence()
    >>> evidence.add([0.3] * 3)
    >>> round(evidence.value, 2)        # the mean of 1.4³ and 1.8³
    4.29
    """

    def __init__(self) -> None:
        self._log_wealth = [0.0] * len(_BETS)

    @property
    def value(self) -> float:
        """The e-value; 1 before any request."""
        return sum(map(math.exp, self._log_wealth)) / len(self._log_wealth)

    def add(self, changes: list[float]) -> None:
        """Bet on new requests; `changes`: challenger's score less champion's, in tokens a round."""
        for change in changes:
            bounded = max(-MAX_CHANGE, min(MAX_CHANGE, change))
            self._log_wealth = [
                min(_MOST_LOG_WEALTH, log_wealth + math.log1p(bet * bounded / MAX_CHANGE))
                for log_wealth, bet in zip(self._log_wealth, _BETS, strict=True)
            ]

    def forget_losses(self) -> None:
        """Begin again if more speaks against the challengers until now than for them."""
        if self.value < 1:
            self.clear()

    def state_dict(self) -> list[float]:
        """The logarithm of what each bet has made of its stake."""
        return list(self._log_wealth)

    def load_state_dict(self, state: list[float]) -> None:
        """Continue from what `state_dict` returned."""
        self._log_wealth = list(state)

    def clear(self) -> None:
        """Begin again, with another champion or another lineage of challengers."""
        self._log_wealth = [0.0] * len(_BETS)
