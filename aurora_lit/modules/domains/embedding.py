"""What a prompt's domain is decided by: the mean of the target's auxiliary hidden states over its positions.

Serving and learning take the same mean, so that both find the same domain. Leaves out clusters
(modules/domains/clusters.py).

Shapes: T positions, P of them that are read, E embedding (three hidden states side by side).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

MAX_POOLED_POSITIONS = 256
"""Positions that a mean is taken of at most."""


def pool_prompt(aux_TE: Tensor, prompt_length: int) -> Tensor | None:
    """Mean of the auxiliary states at evenly spaced positions of a prompt [E]; None if it has fewer than three tokens.

    The sum is accumulated in fp32 and rounded once to the states' type; the mean is fp32.

    - The first position is left out: models use it as an attention sink, and its large values would dominate the mean.
    - The last one is left out too. Serving needs the domain before the first decoding round, and it is this round that
      computes the prompt's last token.
    - At most MAX_POOLED_POSITIONS are read, of longer prompts every second one, every third and so on, so that the
      longest prompt costs the engine some 50 µs. Fewer make the mean noisy: with 64 positions, 22 % of
      real prompts were far from all centroids, instead of 10 % with all (docs/results/domains.md).

    `aux_TE`: states of the prompt's positions, bf16 or fp32; more positions may follow.
    """
    count = prompt_length - 2
    if count < 1:
        return None
    stride = -(-count // MAX_POOLED_POSITIONS)
    positions_P = torch.arange(1, 1 + count, stride, device=aux_TE.device)
    # A sum of rows that makes no fp32 copy of them, in a fifth of the time of mean(0).
    sum_1E = embedding_bag(positions_P, aux_TE, torch.zeros_like(positions_P[:1]), mode="sum")
    return sum_1E[0].float() / len(positions_P)
