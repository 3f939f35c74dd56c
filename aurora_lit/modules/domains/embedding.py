"""What a prompt's domain is decided by: a mean of the target's auxiliary hidden states, mostly of what it says last.

Serving and learning take the same mean, so that both find the same domain. Leaves out clusters
(modules/domains/clusters.py).

Shapes: P positions that are read, E embedding (three hidden states side by side).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

MAX_POOLED_POSITIONS = 128
"""Positions that a mean is taken of at most."""
RECENCY = 32.0
"""Positions over which the weight of a position falls to 1/e of that of a later one."""


def pool_prompt(aux_TE: Tensor, prompt_length: int) -> Tensor | None:
    """Mean of the auxiliary states at a prompt's last positions [E]; None if it has fewer than three tokens.

    A position's weight falls exponentially with its distance from the prompt's end, because what is asked stands there:
    before it come instructions and examples that all requests of a program share, and by which its kinds of requests
    cannot be told apart (docs/results/domains.md). Weights are rounded to the states' type, and so is the sum, once,
    which is accumulated in fp32; the mean is fp32.

    - The first position is left out: models use it as an attention sink, and its large values would dominate the mean.
    - The last one is left out too. Serving needs the domain before the first decoding round, and it is this round that
      computes the prompt's last token.
    - At most MAX_POOLED_POSITIONS are read; those before have a fiftieth of the weight together. So the longest prompt
      costs the engine some 54 µs.

    `aux_TE`: states of the prompt's positions, bf16 or fp32; more positions may follow.
    """
    last = prompt_length - 2
    if last < 1:
        return None
    positions_P = torch.arange(max(1, last + 1 - MAX_POOLED_POSITIONS), last + 1, device=aux_TE.device)
    weights_P = torch.softmax((positions_P - last) / RECENCY, 0).to(aux_TE.dtype)
    # A sum of rows that makes no fp32 copy of them, in two thirds of the time.
    sum_1E = embedding_bag(
        positions_P, aux_TE, torch.zeros_like(positions_P[:1]), mode="sum", per_sample_weights=weights_P
    )
    return sum_1E[0].float()
