"""How many of a chain's misses trees save, learned from the trees that were verified.

What is left out: what is made of it (serve/speculation/planner.py).
"""

from __future__ import annotations

import math

from aurora_lit.request import Output
from aurora_lit.serve.sequences.sequence import VerifiedTokens

_FIRST_SAVED = 0.1
"""Times log2(nodes + 1) − 1: the share of misses saved by trees nobody has seen at work; measured on SmolLM2-135M."""
_MISSES_MEMORY = 0.99


class TreeAcceptance:
    """Shares of levels that missed, in trees of one size and along the chains in them."""

    def __init__(self, nodes: int) -> None:
        self.chain = 0.5
        self.tree = self.chain * (1 - _FIRST_SAVED * (math.log2(nodes + 1) - 1))

    def observe(self, judged: VerifiedTokens, output: Output) -> None:
        """Take in a round's outcome."""
        self.tree = _after(self.tree, output.num_accepted, judged.num_levels)
        self.chain = _after(self.chain, output.chain_accepted, output.chain_proposed)

    def saved(self, rate: float) -> float:
        """The share of a chain's misses that the tree saves, for a chain's acceptance rate."""
        usual = max(0.0, 1.0 - self.tree / max(self.chain, 1e-3))
        return usual * min(1.0, rate / max(1.0 - self.chain, 1e-3))


def _after(misses: float, accepted: int, reached: int) -> float:
    """A share of misses after a path that accepted so many of the levels it reached."""
    for level in range(min(accepted + 1, reached)):
        misses += (1 - _MISSES_MEMORY) * ((level >= accepted) - misses)
    return misses
