"""What a prompt's domain is decided by: the mean of the target's auxiliary hidden states over its positions.

Serving and learning take the same mean, so that both find the same domain. Leaves out clusters
(modules/domains/clusters.py).

Shapes: T positions, E embedding (three hidden states side by side).
"""

from __future__ import annotations

from torch import Tensor

MAX_POOLED_POSITIONS = 64
"""Positions that a mean is taken of at most."""


def pool_prompt(aux_TE: Tensor, prompt_length: int) -> Tensor | None:
    """Mean of the auxiliary states at evenly spaced positions of a prompt [E], fp32; None if it has fewer than three.

    - The first position is left out: models use it as an attention sink, and its large values would dominate the mean.
    - The last one is left out too. Serving needs the domain before the first decoding round, and it is this round that
      computes the prompt's last token.
    - At most MAX_POOLED_POSITIONS are read, every second of 65 to 128 and so on. The mean over all of a long prompt
      would take the engine as long as several layers of the target take for a token; neighbours say much the same, so
      the domain hardly ever differs.

    `aux_TE`: states of the prompt's positions, in any floating-point type; more positions may follow.
    """
    count = prompt_length - 2
    if count < 1:
        return None
    stride = -(-count // MAX_POOLED_POSITIONS)
    return aux_TE[1 : 1 + count : stride].float().mean(0)
