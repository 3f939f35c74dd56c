"""Uniform random numbers that depend on a seed alone, and drawing a token with one of them.

A draw inverts the cumulative distribution in float64. It therefore uses exactly one uniform number, and a token of
probability 0 is never drawn. Nothing here has state: a seeded number depends only on the request's seed and the token's
index in its output, so there is nothing to restore when proposals are rejected.

Leaves out who draws what (modules/sampling/proposals.py, modules/sampling/verification.py).

Shapes: B sequences, V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw(weight_V: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds uniform · total.

    Args:
        weight_V: weights ≥ 0 [..., V]; they need not sum to 1.
        uniform: numbers in [0, 1) [...].

    Returns:
        Token indices [...], int64.
    """
    cumulative = weight_V.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:].contiguous()
    token = torch.searchsorted(cumulative, uniform.double()[..., None] * total, right=True)
    # uniform · total may round up to total; the bound is the last token of positive weight.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(token, last)[..., 0]


def seeded_uniforms(seed_B: Tensor, *, output_index_B: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) for `count` consecutive output tokens of each sequence.

    SplitMix64 (Steele, Lea, Flood 2014), started at the mixed seed and advanced to the token's output index.

    Args:
        seed_B: int64 seeds.
        output_index_B: int64, index in the output of the first token to draw.
        count: tokens for which numbers are wanted.

    Returns:
        Numbers [B, count], float64.
    """
    index_BT = output_index_B[:, None] + torch.arange(1, count + 1, device=output_index_B.device)
    bits_BT = _mix64(_mix64(seed_B)[:, None] + index_BT * -7046029254386353131)  # 0x9E3779B97F4A7C15
    return ((bits_BT >> 11) & (2**53 - 1)).double() * 2.0**-53


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's bit mixer on int64, whose products wrap around; the masks make the right shifts logical."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & (2**33 - 1))
