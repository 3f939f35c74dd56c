"""How often the draft's first choices were accepted, by the share of probability that the draft gave them.

Drafts are not calibrated: in greedy decoding a first choice with a share of 0.4 is accepted in six of ten cases, at a
temperature of 0.7 one with 0.9 in eight. What a drafted token promises (`Weighing` in kernels/draft_steps.py) is read
from here. Other choices are accepted about as often as their shares say, greedy and sampled.

Left out: what a token must promise (serve/speculation/planner.py).

Shapes: K kinds of sequences, greedy and sampled; C classes of shares.
"""

from __future__ import annotations

import torch

from aurora_lit.kernels.draft_steps import SHARE_CLASSES

_INITIAL = (
    (0.15, 0.16, 0.27, 0.35, 0.40, 0.53, 0.62, 0.69, 0.71, 0.83, 0.87, 0.87, 0.87, 0.91, 0.95, 0.96),
    (0.06, 0.13, 0.17, 0.27, 0.30, 0.35, 0.43, 0.49, 0.50, 0.52, 0.62, 0.62, 0.65, 0.70, 0.72, 0.83),
)
"""Before any was verified: greedy, and sampled at 0.7 and 1.0; of 5,600 rounds of SmolLM2-135M, made to rise."""
_INITIAL_WEIGHT, _MOST_WEIGHT = 32, 500
"""Tokens that the initial rate counts as, and that a rate remembers."""


class DraftReliability:
    """Learns from every first choice whose outcome is known, whether it was proposed or not.

    >>> reliability.observe(sampled=False, share=0.4, accepted=True)
    >>> reliability.acceptance_KC[0, 6]
    """

    def __init__(self) -> None:
        self.acceptance_KC = torch.tensor(_INITIAL, dtype=torch.float32)
        """Native calls read it where it is."""
        self._rates = self.acceptance_KC.numpy()
        self._weights = [[_INITIAL_WEIGHT] * SHARE_CLASSES for _ in _INITIAL]

    def observe(self, *, sampled: bool, share: float, accepted: bool) -> None:
        """Add a first choice after tokens that were all accepted."""
        at = min(SHARE_CLASSES - 1, int(share * SHARE_CLASSES))
        rates, weights = self._rates[int(sampled)], self._weights[int(sampled)]
        weights[at] = min(weights[at] + 1, _MOST_WEIGHT)
        rates[at] += (accepted - rates[at]) / weights[at]
