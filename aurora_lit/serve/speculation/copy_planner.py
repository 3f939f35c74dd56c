"""How many copied tokens a round proposes: how often such tokens were accepted, against what they cost.

Copies come from earlier in the request or from the traffic memory (kernels/suffix_index.py), as a tree of nodes. A node
is the more often accepted the more tokens agree before it, and the larger the share of the occurrences that go on with
it. Both are counted over all traffic. Trees end where the next node becomes too improbable: at the threshold, common to
all sequences, that promises the most tokens per second.

Left out: costs (serve/speculation/costs.py), the draft (serve/speculation/planner.py), and which copies there are.

Shapes: R tables of rates, C cells of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from aurora_lit.kernels.suffix_index import COUNT_CLASSES, KINDS, LENGTH_CLASSES, NUM_CELLS, SHARE_CLASSES
from aurora_lit.serve.speculation.planner import SpeculationPlanner

RELATIONS = ("alone", "agrees", "against")
"""What the draft says to a copied node: nothing, since it proposed nothing there; the same token; another one."""
_INITIAL_RATES = (
    (0.30, 0.60, 0.70, 0.73, 0.80, 0.85, 0.90, 0.94),
    (0.25, 0.45, 0.70, 0.78, 0.84, 0.88, 0.91, 0.92),
    (0.50, 0.84, 0.87, 0.90, 0.92, 0.94, 0.95, 0.96),
)
"""For each kind and class of lengths, how often a node was accepted to which all occurrences lead, before any was
verified. Measured on SmolLM2-135M, greedy (docs/results/traffic-memory.md)."""
_INITIAL_SHARES = (0.12, 0.28, 0.48, 0.85, 1.0)
"""By which that is multiplied for each class of shares; measured likewise."""
_INITIAL_SAMPLED = 0.7
"""The same for sampled sequences."""
_INITIAL_AGAINST = 0.4
"""The same for nodes beside which the draft proposed another token."""
_INITIAL_WEIGHT, _MOST_WEIGHT = 8, 200
"""Nodes that the initial rate counts as; and that a rate remembers."""
_THRESHOLDS = (0.9, 0.75, 0.6, 0.45, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05)
LEAST_SURVIVAL = _THRESHOLDS[-1]
"""Smaller ones are never proposed."""


class CopyReliability:
    """How often copied nodes were accepted if their parents were, by what is known about them.

    >>> reliability = CopyReliability()
    >>> table = reliability.table(sampled=False)
    >>> reliability.observe(table, cell, accepted=True)
    """

    def __init__(self) -> None:
        shape = (len(KINDS), len(LENGTH_CLASSES), len(SHARE_CLASSES), len(COUNT_CLASSES))
        initial = torch.tensor(_INITIAL_RATES)[..., None, None] * torch.tensor(_INITIAL_SHARES)[:, None]
        initial_C = initial.expand(shape).flatten()
        factors = [
            (_INITIAL_SAMPLED if sampled else 1.0) * (_INITIAL_AGAINST if relation == "against" else 1.0)
            for sampled in (False, True)
            for relation in RELATIONS
        ]
        self.rate_RC = torch.stack([factor * initial_C for factor in factors])
        """fp32."""
        self.trials_RC = torch.zeros(len(factors), NUM_CELLS, dtype=torch.int64)
        """Nodes that were verified."""
        self._rates, self._trials = self.rate_RC.numpy(), self.trials_RC.numpy()

    def table(self, *, sampled: bool, relation: str = "alone") -> int:
        """The line of `rate_RC` for nodes of greedy or sampled sequences in this relation to the draft's."""
        return len(RELATIONS) * sampled + RELATIONS.index(relation)

    def rate(self, table: int, cell: int) -> float:
        """Probability that a node is accepted if its parent is."""
        return float(self._rates[table, cell])

    def observe(self, table: int, cell: int, *, accepted: bool) -> None:
        """Add a node whose parent was accepted."""
        self._trials[table, cell] += 1
        weight = min(_INITIAL_WEIGHT + self._trials[table, cell], _MOST_WEIGHT)
        self._rates[table, cell] += (accepted - self._rates[table, cell]) / weight


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
        self, survivals: Sequence[Sequence[float]], rates: Sequence[float], *, batch_size: int, sampled: bool = False
    ) -> CopyPlan:
        """How many copied nodes to propose, for each sequence that has some.

        `survivals[b]`: probabilities that its nodes are accepted, descending; `rates`: the draft's acceptance rates;
        `batch_size`: all sequences; `sampled`: most of them are.
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
            return CopyPlan(counts, fastest)
        column_tokens = fastest * (costs.round_s(batch_size, counts) - plain_s) / columns

        def draft_gain(rate: float) -> float:
            return planner.expected_draft_gain(
                rate, batch_size=batch_size, sampled=sampled, speed=fastest, column_tokens=column_tokens
            )

        counts = [
            count if count and tokens - count * column_tokens >= draft_gain(rate) else 0
            for count, tokens, rate in zip(counts, gains(counts), rates, strict=True)
        ]
        return CopyPlan(counts, fastest)
