"""The target's own token for rows of logits: the argmax, or drawn with Gumbel noise.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aurora_lit.modules.sampling.noise import gumbel


def choose(logits_NV: Tensor, *, temperature_N: Tensor, key_N: Tensor, position_N: Tensor) -> Tensor:
    """The argmax of logits at temperature 0, otherwise of logit · (1 / temperature) + noise; int64 [N].

    That is a draw from softmax(logits / temperature); see `gumbel` for the noise of `key_N` and `position_N`. The
    first of equal tokens is chosen. `PackedLinear.choose` does the same without storing logits.
    """
    token_N = logits_NV.argmax(-1)
    drawn = (temperature_N > 0).nonzero()[:, 0]
    if drawn.numel():
        perturbed = logits_NV[drawn].float() * temperature_N[drawn].float().reciprocal()[:, None]
        perturbed += gumbel(key_N[drawn], position_N[drawn], torch.arange(logits_NV.shape[1], device=perturbed.device))
        token_N[drawn] = perturbed.argmax(-1)
    return token_N
