"""How many tokens to copy in a round: how often copies were right, against what verifying them costs.

A copy's tokens are the likelier right the more tokens agree in front of it, and the more of it has been right. Both are
counted over all traffic. A row's copy ends where its next token is too unlikely: at the threshold, one for all rows,
that promises most tokens a second.

What is left out: where copies come from (serve/sequences/ngram_index.py), costs (serve/speculation/costs.py), the draft (serve/speculation/planner.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from aurora_lit.serve.speculation.planner import SpeculationPlanner

_MATCHES = (2, 3, 4, 6, 9)
"""Numbers of tokens that agree from which on copies are counted apart."""
_FIRST_SHARES = ((0.48, 0.63, 0.84), (0.7, 0.76, 0.85), (0.7, 0.77, 0.85), (0.92, 0.84, 0.9), (0.95, 0.97, 0.96))
"""For each, the shares in which a copy's first, second and later tokens are right when those before them are: in copies
nobody has seen yet. Measured on SmolLM2-135M (chat, code and summaries)."""
_MEMORY = 0.98
_THRESHOLDS = (0.9, 0.75, 0.6, 0.45, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05)


class NgramAcceptance:
    """How often copied tokens were right, by how many tokens agreed.

    >>> record = NgramAcceptance()
    >>> record.survival(9, 3)  # the probability that the first, the first two, … tokens of the copy are right
    [0.95, 0.9215, 0.88464]
    """

    def __init__(self) -> None:
        self._shares = [list(shares) for shares in _FIRST_SHARES]

    def survival(self, match: int, count: int) -> list[float]:
        """Probability that the first j of `count` copied tokens are right, for j = 1, 2, …"""
        first, second, later = self._of(match)
        found, reached = [], 1.0
        for j in range(count):
            reached *= later if j > 1 else second if j else first
            found.append(reached)
        return found

    def observe(self, match: int, *, proposed: int, accepted: int) -> None:
        """Take in a round's outcome."""
        shares = self._of(match)
        for j in range(min(accepted + 1, proposed)):
            at = min(j, 2)
            shares[at] += (1 - _MEMORY) * ((j < accepted) - shares[at])

    def _of(self, match: int) -> list[float]:
        return self._shares[max(0, bisect_right(_MATCHES, match) - 1)]


class NgramPlanner:
    """How many tokens each row copies, beside a draft that follows `policy`."""

    def __init__(self, policy: SpeculationPlanner, *, most: int) -> None:
        """`most`: tokens a row."""
        self.record = NgramAcceptance()
        self.most = most
        self._policy = policy

    def choose(self, survivals: Sequence[Sequence[float]], rates: Sequence[float], *, num_others: int) -> list[int]:
        """How many tokens to verify for each row that has a copy; 0 where its draft promises more.

        `survivals[b][j]`: probability that the first j + 1 tokens of the row's copy are right; `rates`: the draft's.
        """
        if not self._policy.adaptive:
            return [len(survival) for survival in survivals]
        rows = len(survivals) + num_others

        def gained(counts: Sequence[int]) -> list[float]:
            return [sum(survival[:count]) for survival, count in zip(survivals, counts, strict=True)]

        plain_s = self._policy.round_s(rows, [])
        counts, fastest = [0] * len(survivals), rows / plain_s if plain_s else 0.0
        for threshold in _THRESHOLDS:
            longer = [sum(reached >= threshold for reached in survival) for survival in survivals]
            if longer == counts:
                continue
            round_s = self._policy.round_s(rows, longer)
            speed = (rows + sum(gained(longer))) / round_s if round_s else float(sum(longer))
            if speed > fastest:
                counts, fastest = longer, speed
            elif any(counts):
                break
        columns = sum(counts)
        if not columns:
            return counts
        column_tokens = fastest * (self._policy.round_s(rows, counts) - plain_s) / columns
        return [
            count
            if tokens - count * column_tokens
            >= self._policy.promised_tokens(rate, rows=rows, speed=fastest, column_tokens=column_tokens)
            else 0
            for count, tokens, rate in zip(counts, gained(counts), rates, strict=True)
        ]
