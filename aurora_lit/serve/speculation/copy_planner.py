"""How many copied tokens a round proposes: how often such tokens were accepted, against what they cost.

Copies come from earlier in the request or from the traffic memory (kernels/suffix_index.py), as a tree of nodes. Trees
end where the next node becomes too improbable: at the threshold, common to all sequences, that promises the most tokens
per second.

Left out: costs (serve/speculation/costs.py), the draft (serve/speculation/planner.py), which copies there are, and how
probable each is (kernels/copy_rates.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aurora_lit.serve.speculation.planner import SpeculationPlanner

_THRESHOLDS = (0.9, 0.75, 0.6, 0.45, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05)
LEAST_SURVIVAL = _THRESHOLDS[-1]
"""Smaller ones are never proposed."""


class CopyPlan(NamedTuple):
    """What a round copies."""

    counts: list[int]
    """For each sequence, how many of its nodes to propose, most probable first; 0: leave it to the draft."""
    speed: float
    """Tokens per second that this promises, if nothing is drafted."""


class CopyPlanner:
    """Chooses how many copied nodes each sequence proposes, beside a draft that follows `planner`."""

    def __init__(self, planner: SpeculationPlanner) -> None:
        self._planner = planner

    def choose(
        self,
        survivals: Sequence[Sequence[float]],
        rates: Sequence[float],
        *,
        batch_size: int,
        is_trial: bool = False,
    ) -> CopyPlan:
        """How many copied nodes to propose, for each sequence that has some.

        `survivals[b]`: probabilities that its nodes are accepted, descending; `rates`: the draft's acceptance rates;
        `batch_size`: all sequences. `is_trial`: the most probable node is proposed even if none repays its column.
        """
        planner, costs = self._planner, self._planner.costs
        if not planner.limits.adaptive:
            return CopyPlan([len(survival) for survival in survivals], 0.0)

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
            if is_trial:
                counts[max(range(len(counts)), key=lambda b: survivals[b][0])] = 1
            return CopyPlan(counts, fastest)
        column_tokens = fastest * (costs.round_s(batch_size, counts) - plain_s) / columns

        def draft_gain(rate: float) -> float:
            return planner.expected_draft_gain(rate, batch_size=batch_size, speed=fastest, column_tokens=column_tokens)

        counts = [
            count if count and tokens - count * column_tokens >= draft_gain(rate) else 0
            for count, tokens, rate in zip(counts, gains(counts), rates, strict=True)
        ]
        return CopyPlan(counts, fastest)
