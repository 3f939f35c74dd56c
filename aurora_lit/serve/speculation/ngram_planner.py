"""How many tokens n-gram lookup proposes in a round: how often such tokens were accepted, against what they cost.

The tokens after a match are more often accepted the longer the match is, and the more of the tokens before them were.
Both are counted over all traffic. A sequence's proposals end where the next token becomes too improbable: at the
threshold, common to all sequences, that promises the most tokens per second.

This file holds statistics and decisions; the tokens come from the index of each sequence
(serve/sequences/ngram_index.py). Left out: costs (serve/speculation/costs.py) and the draft
(serve/speculation/planner.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from aurora_lit.serve.speculation.planner import SpeculationPlanner

_MATCH_CLASSES = (2, 3, 4, 6, 9)
"""Match lengths from which on acceptance is counted separately."""
_INITIAL_RATES = ((0.48, 0.63, 0.84), (0.7, 0.76, 0.85), (0.7, 0.77, 0.85), (0.92, 0.84, 0.9), (0.95, 0.97, 0.96))
"""For each class, the rates at which the first, the second and later tokens are accepted if those before them were,
before any was verified. Measured on SmolLM2-135M (chat, code and summaries)."""
_DECAY = 0.98
"""Weight of the old rate, per token."""
_THRESHOLDS = (0.9, 0.75, 0.6, 0.45, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05)


class NgramAcceptance:
    """How often looked-up tokens were accepted, by length of the match.

    >>> acceptance = NgramAcceptance()
    >>> acceptance.survival(9, 3)  # the probability that the first, the first two, … tokens are accepted
    [0.95, 0.9215, 0.88464]
    """

    def __init__(self) -> None:
        self._rates = [list(rates) for rates in _INITIAL_RATES]

    def survival(self, match: int, count: int) -> list[float]:
        """Probability that the first j of `count` tokens are accepted, for j = 1, 2, …"""
        first, second, later = self._rates_of(match)
        survival, reached = [], 1.0
        for j in range(count):
            reached *= later if j > 1 else second if j else first
            survival.append(reached)
        return survival

    def observe(self, match: int, *, proposed: int, accepted: int) -> None:
        """Update by a round's outcome."""
        rates = self._rates_of(match)
        for j in range(min(accepted + 1, proposed)):
            place = min(j, 2)
            rates[place] += (1 - _DECAY) * ((j < accepted) - rates[place])

    def _rates_of(self, match: int) -> list[float]:
        return self._rates[max(0, bisect_right(_MATCH_CLASSES, match) - 1)]


class NgramPlanner:
    """Chooses how many looked-up tokens each sequence proposes, beside a draft that follows `planner`."""

    def __init__(self, planner: SpeculationPlanner) -> None:
        self.acceptance = {sampled: NgramAcceptance() for sampled in (False, True)}
        """Of greedy and of sampled sequences."""
        self._planner = planner

    def choose(
        self, survivals: Sequence[Sequence[float]], rates: Sequence[float], *, batch_size: int, sampled: bool = False
    ) -> list[int]:
        """Numbers of looked-up tokens to propose, for each sequence with a match; 0 where the draft promises more.

        `survivals[b][j]`: probability that the first j + 1 looked-up tokens are accepted; `rates`: the draft's
        acceptance rates; `batch_size`: all sequences; `sampled`: most of them are.
        """
        planner, costs = self._planner, self._planner.costs
        if not planner.limits.adaptive:
            return [len(survival) for survival in survivals]

        def gains(counts: Sequence[int]) -> list[float]:
            return [sum(survival[:count]) for survival, count in zip(survivals, counts, strict=True)]

        plain_s = costs.round_s(batch_size, [])
        counts, fastest = [0] * len(survivals), batch_size / plain_s if plain_s else 0.0
        for threshold in _THRESHOLDS:
            longer = [sum(reached >= threshold for reached in survival) for survival in survivals]
            if longer == counts:
                continue
            round_s = costs.round_s(batch_size, longer)
            speed = (batch_size + sum(gains(longer))) / round_s if round_s else float(sum(longer))
            if speed > fastest:
                counts, fastest = longer, speed
            elif any(counts):
                break
        columns = sum(counts)
        if not columns:
            return counts
        column_tokens = fastest * (costs.round_s(batch_size, counts) - plain_s) / columns

        def draft_gain(rate: float) -> float:
            return planner.expected_draft_gain(
                rate, batch_size=batch_size, sampled=sampled, speed=fastest, column_tokens=column_tokens
            )

        return [
            count if count and tokens - count * column_tokens >= draft_gain(rate) else 0
            for count, tokens, rate in zip(counts, gains(counts), rates, strict=True)
        ]
