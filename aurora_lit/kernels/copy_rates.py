"""How often copied nodes were accepted if their parents were, by what is known about them.

A node is the more often accepted the more tokens agree before it, and the larger the share of the occurrences that go
on with it. Both are counted over all traffic. The rates are what a look-up (kernels/suffix_index.py) takes survivals
from; leaves out how many nodes are proposed (serve/speculation/weigh.py).

Shapes: R tables of rates, C cells of a table.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from aurora_lit.kernels.suffix_index import COUNT_CLASSES, KINDS, LENGTH_CLASSES, NUM_CELLS, SHARE_CLASSES, Copies

RELATIONS = ("alone", "agrees", "against")
"""What the draft says to a copied node: nothing, since it proposed nothing there; the same token; another one."""
_INITIAL_RATES = (
    (0.30, 0.60, 0.70, 0.73, 0.80, 0.85, 0.90, 0.94),
    (0.25, 0.45, 0.70, 0.78, 0.84, 0.88, 0.91, 0.92),
    (0.50, 0.84, 0.87, 0.90, 0.92, 0.94, 0.95, 0.96),
    (0.40, 0.63, 0.82, 0.90, 0.94, 0.96, 0.97, 0.98),
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

    def observe_tree(self, table: int, copies: Copies, path: Collection[int]) -> None:
        """Add a proposed tree of copies; `path`: the accepted columns, column 0 included."""
        for column, (parent, cell) in enumerate(zip(copies.parents, copies.cells, strict=True), start=1):
            if parent in path:
                self.observe(table, cell, accepted=column in path)

    def observe(self, table: int, cell: int, *, accepted: bool) -> None:
        """Add a node whose parent was accepted."""
        self._trials[table, cell] += 1
        weight = min(_INITIAL_WEIGHT + self._trials[table, cell], _MOST_WEIGHT)
        self._rates[table, cell] += (accepted - self._rates[table, cell]) / weight
