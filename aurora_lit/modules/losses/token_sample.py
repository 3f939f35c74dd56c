"""A sample of the draft vocabulary, over which the LK loss of a batch is computed instead of all of it.

A head of 16,384 rows costs two thirds of a position's arithmetic, and nearly all of it goes to tokens that neither the
target nor the draft considers there. The sample has the tokens that a batch is about for certain, and some of all
others, which stand for the rest.

Leaves out the loss (modules/losses/fused_lk.py).

Shapes: D draft vocabulary, S sampled tokens, X any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MULTIPLE = 16
"""The native kernel wants a multiple of this as the number of tokens."""
_CERTAIN_SHARE = 0.75
"""Share of the sample that is certain at least, filled up with the lowest ids, which tokenizers give to what is
frequent."""
_GOLDEN = 0.6180339887498949
"""Its multiples, modulo 1, fill [0, 1) evenly."""


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """Tokens that are in the sample for certain, then some drawn from all others.

    Each drawn token stands for `weight` tokens: its logits, the draft's and the target's, are raised by the weight's
    logarithm. Σ min(p, q), Σ p·log(p/q) and the softmax's denominator are then estimated without bias, if every draw is
    equally likely (sampled softmax: Jean et al. 2015, arXiv 1412.2007); the logarithm of the denominator is not.
    """

    index_S: Tensor
    """int64 draft ids, the certain ones first."""
    num_certain: int
    weight: float
    """Tokens that are not certain, divided by how many of them were drawn."""

    def raise_logits(self, logits_XS: Tensor) -> None:
        """Raise the drawn tokens' logits, in place."""
        logits_XS[..., self.num_certain :] += math.log(self.weight)


def sample_tokens(index_X: Tensor, *, vocabulary: int, size: int, turn: int) -> TokenSample | None:
    """A sample of about `size` tokens with all those in `index_X`; None if the vocabulary is hardly larger.

    Args:
        index_X: int64 draft ids, in any order and number.
        vocabulary: D.
        size: S; more if the certain tokens leave too few draws.
        turn: number of the sample. Every token that is not certain is drawn once in `weight` successive turns.
    """
    certain_D = torch.zeros(vocabulary, dtype=torch.bool, device=index_X.device)
    certain_D[index_X] = True
    missing = int(_CERTAIN_SHARE * size) - int(certain_D.sum())
    if missing > 0:
        certain_D |= ~certain_D & ((~certain_D).cumsum(0) <= missing)
    certain_C, others = certain_D.nonzero()[:, 0], (~certain_D).nonzero()[:, 0]
    num_drawn = max(size - len(certain_C), int((1 - _CERTAIN_SHARE) * size))
    num_drawn += -(len(certain_C) + num_drawn) % _MULTIPLE
    if num_drawn >= len(others):
        return None
    # Evenly spaced, so that ids of every frequency are drawn.
    stride = len(others) / num_drawn
    place = (torch.arange(num_drawn, device=index_X.device) * stride + turn * _GOLDEN % 1 * stride).long()
    return TokenSample(
        index_S=torch.cat([certain_C, others[place.clamp_max(len(others) - 1)]]),
        num_certain=len(certain_C),
        weight=stride,
    )
